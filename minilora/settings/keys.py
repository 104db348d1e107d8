"""Every key that a run knows: its default, its meaning, and the values that it may have.

Names and defaults are LLaMA-Factory's and the Hugging Face Trainer's; where a default or a key is
ours, its help text says so.
"""

# No `from __future__ import annotations`: the type of a setting is read from its annotation.

import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, fields
from typing import Any

from minilora.settings.fields import setting

# What data/named_templates.py has besides the checkpoint's own chat template.
TEMPLATES = ("llama3", "mistral", "qwen", "qwen3", "qwen3_nothink")

# The tokens that a block computes at a time, on a CPU, and at the least on a GPU.
TILE_TOKENS = 2048


# A table, with two or three lines for each setting.
# fmt: off
@dataclass(frozen=True)
class ModelSettings:
    """Which weights are trained, and whether their activations are recomputed."""

    model_name_or_path: str | None = setting(
        None, "Folder of the base model, with config.json, *.safetensors and the tokenizer. "
        "Required.")
    adapter_name_or_path: str | None = setting(
        None, "Folder of a PEFT LoRA adapter to train further. Its steps are counted from 0 again.")
    disable_gradient_checkpointing: bool = setting(
        False, "Keep the activations of all blocks instead of recomputing them. This is faster and "
        "takes far more memory.")
    quantization_bit: int | None = setting(
        None, "4: hold the frozen weights of the blocks' linear layers in 4 bits (QLoRA's NF4), "
        "packed while they are read. Default: in bf16.")


@dataclass(frozen=True)
class MethodSettings:
    """What is learned: the objective and the shape of the adapter."""

    stage: str = setting(
        "sft", "sft learns the answers of conversations, pt learns plain text.",
        choices=("sft", "pt"))
    lora_rank: int = setting(8, "Rank of each pair of LoRA matrices.", at_least=1)
    lora_alpha: int | None = setting(
        None, "Strength of LoRA: its product is scaled by lora_alpha / lora_rank. Default: 2 x "
        "lora_rank.", at_least=1)
    lora_dropout: float = setting(
        0.0, "Share of the inputs of each LoRA pair that training sets to zero.",
        at_least=0, below=1)
    lora_target: tuple[str, ...] = setting(
        ("all",), "Layers that get a LoRA pair: all, names such as q_proj,v_proj, or one regular "
        "expression for whole paths.", pattern=True)
    use_rslora: bool = setting(
        False, "Train rsLoRA, which scales by lora_alpha / sqrt(lora_rank) instead.")
    use_dora: bool = setting(
        False, "Train DoRA, which learns the length of each row of a weight beside LoRA.")
    rank_pattern: dict[str, int] | None = setting(
        None, "Other ranks for some layers: {PATTERN: RANK, ...}. A pattern is a regular "
        "expression for the end of a layer's path.")
    alpha_pattern: dict[str, int] | None = setting(
        None, "Other values of lora_alpha for some layers, written like rank_pattern.")
    additional_target: tuple[str, ...] | None = setting(
        None, "Trained whole, without LoRA: lm_head, embed_tokens or both. PEFT calls them "
        "modules_to_save.")

    @property
    def alpha(self) -> int:
        """lora_alpha, or its default of twice the rank."""
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha


@dataclass(frozen=True)
class DataSettings:
    """Which rows are trained on, and how they become tokens."""

    dataset: tuple[str, ...] = setting(
        (), "Names from dataset_info.json and paths of .json, .jsonl and .txt files. Required to "
        "train.")
    eval_dataset: tuple[str, ...] | None = setting(
        None, "Datasets to validate with, written like dataset.")
    val_size: float = setting(
        0.0, "Rows held out to validate with: their number, or below 1 their share.", at_least=0)
    dataset_dir: str = setting(
        "data", "Folder of dataset_info.json and of the files that it names.")
    template: str | None = setting(
        None, "Chat template. Default: the one that came with the base model.", choices=TEMPLATES)
    default_system: str | None = setting(
        None, "System message of conversations that have none. Default: what the template says.")
    cutoff_len: int = setting(
        2048, "Longest conversation in tokens. Longer ones are truncated.", at_least=2)
    train_on_prompt: bool = setting(
        False, "Learn the questions too, and not only the answers.")
    mask_history: bool = setting(False, "Learn only the last answer of each conversation.")
    packing: bool | None = setting(
        None, "Fill each row of a batch with documents up to cutoff_len tokens. Default: true for "
        "stage pt, false for sft.")
    split_special_tokens: bool = setting(
        True, "Rows that hold the text of a special token keep it as plain characters; false makes "
        "it that token. The default is ours; LLaMA-Factory's is false.")
    max_samples: int | None = setting(
        None, "Use only the first N rows of each dataset.", at_least=1)


@dataclass(frozen=True)
class TrainSettings:
    """How long, how fast and in which steps to train, and what to write."""

    output_dir: str | None = setting(
        None, "Folder that the run writes into. Required to train.")
    overwrite_output_dir: bool = setting(
        False, "Write into output_dir even if it holds a run.")
    per_device_train_batch_size: int = setting(
        8, "Documents per GPU and micro-batch. It changes what a step is, not how much memory it "
        "takes.", at_least=1)
    gradient_accumulation_steps: int = setting(
        1, "Micro-batches per optimizer step. It changes what a step is, not how much memory it "
        "takes.", at_least=1)
    learning_rate: float = setting(5e-5, "Highest learning rate of the run.", above=0)
    num_train_epochs: float = setting(3.0, "Passes over the data.", above=0)
    max_steps: int = setting(
        -1, "Stop after this many optimizer steps, whatever num_train_epochs says. -1: no such "
        "limit.", at_least=-1)
    lr_scheduler_type: str = setting(
        "linear", "How the learning rate falls after the warm-up.",
        choices=("linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
                 "constant_with_warmup", "inverse_sqrt"))
    warmup_ratio: float = setting(
        0.0, "Share of the steps in which the learning rate rises from 0.", at_least=0, at_most=1)
    warmup_steps: float = setting(
        0, "Steps in which the learning rate rises from 0, or below 1 their share of the run. "
        "Above 0 it overrides warmup_ratio.", share=True, at_least=0)
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", at_least=0)
    max_grad_norm: float = setting(
        1.0, "A gradient with a larger norm is scaled down to this one. 0: never.", at_least=0)
    adam_beta1: float = setting(0.9, "beta1 of AdamW.", at_least=0, below=1)
    adam_beta2: float = setting(0.999, "beta2 of AdamW.", at_least=0, below=1)
    adam_epsilon: float = setting(1e-8, "epsilon of AdamW.", above=0)
    loraplus_lr_ratio: float | None = setting(
        None, "Train with LoRA+: each lora_B learns at this multiple of learning_rate.", above=0)
    bf16: bool | None = setting(
        None, "Compute in bfloat16. Default: true on a GPU, false on a CPU.")
    seed: int = setting(
        42, "Seed of the data order, of LoRA's first values and of dropout.",
        at_least=0, at_most=2**32 - 1)
    disable_shuffling: bool = setting(False, "Keep the rows in the order of the files.")
    logging_steps: float = setting(
        10, "Steps per line of trainer_log.jsonl, or below 1 their share of the run. The default "
        "is ours; the Trainer's is 500.", share=True, above=0)
    save_strategy: str = setting(
        "steps", "When to write a snapshot from which a run can resume.",
        choices=("steps", "epoch", "no"))
    save_steps: float = setting(
        500, "Steps per snapshot, for save_strategy steps; or below 1 their share of the run.",
        share=True, above=0)
    save_only_model: bool = setting(
        False, "Snapshots hold the adapter alone. They are smaller, and no run can resume from "
        "them.")
    save_total_limit: int | None = setting(
        None, "Keep only the newest N snapshots. Default: all.", at_least=1)
    resume_from_checkpoint: str | None = setting(
        None, "Folder of a snapshot to resume from; or true: resume from the newest one in "
        "output_dir, if there is one.")
    eval_strategy: str = setting("no", "When to validate.", choices=("no", "steps", "epoch"))
    eval_steps: float | None = setting(
        None, "Steps per validation, for eval_strategy steps; or below 1 their share of the run. "
        "Default: logging_steps.", share=True, above=0)
    report_to: tuple[str, ...] = setting(
        ("none",), "Also send the logged figures there. The program's package must be installed.",
        choices=("none", "tensorboard", "wandb", "comet_ml"))
    load_best_model_at_end: bool = setting(
        False, "Leave the adapter that validated best in output_dir, instead of the last one.")
    metric_for_best_model: str | None = setting(
        None, "The metric by which the best adapter is found. Default: eval_loss.",
        choices=("eval_loss", "loss", "eval_accuracy", "accuracy"))
    greater_is_better: bool | None = setting(
        None, "Whether a higher value of that metric is better. Default: true, unless it is a "
        "loss.")
    early_stopping_steps: int | None = setting(
        None, "Stop after this many validations in a row without a better one.", at_least=1)
    plot_loss: bool = setting(
        True, "Draw training_loss.png, which needs matplotlib. The default is ours.")
    deepspeed: str | None = setting(
        None, "DeepSpeed's JSON file, or the name of one that comes with minilora. Default: zero3.")
    # In nanoseconds, 1e9 seconds still fit into 64 bits.
    ddp_timeout: int = setting(
        1800, "Seconds that a process waits for the others.", at_least=1, at_most=10**9)
    tile_tokens: int | None = setting(
        None, "Ours: tokens that a block computes at a time. Fewer need less working memory. "
        "Default: 2048, and on a GPU up to 8192 where they fit.", at_least=1)
    gather_tokens: int | None = setting(
        None, "Ours: tokens that share one gather of each block. Fewer need less memory for saved "
        "inputs. Default: the whole step.", at_least=1)
    loss_tokens: int = setting(
        1024, "Ours: labelled tokens whose logits exist at one time in the loss.", at_least=1)
    offload_activations: bool = setting(
        False, "Ours: keep the inputs of the blocks in host memory between forward and backward.")
    strict_plan: bool = setting(
        False, "Ours: refuse a run that does not fit by its memory plan.")
    memory_snapshot: bool = setting(
        False, "Ours: when a GPU runs out of memory, write torch's record of it to output_dir.")
    keep_blocks: int | None = setting(
        None, "Ours: how many blocks, the last ones, keep their activations instead of recomputing "
        "them. Default: as many as fit.", at_least=0)
    verbose_deepspeed: bool = setting(False, "Ours: print DeepSpeed's own log lines too.")
    # fmt: on

    def computes_in_bf16(self, on_gpu: bool) -> bool:
        """The bf16 setting, or its default: bf16 on a GPU, fp32 on a CPU."""
        return on_gpu if self.bf16 is None else self.bf16

    @property
    def least_tile_tokens(self) -> int:
        """tile_tokens, or the least of what a run chooses by itself."""
        return TILE_TOKENS if self.tile_tokens is None else self.tile_tokens

    @property
    def eval_every(self) -> float:
        """eval_steps, or its default of logging_steps."""
        return self.eval_steps or self.logging_steps

    @property
    def judged_by(self) -> tuple[str, bool]:
        """The metric that says which model is best, as in the log, and whether more is better."""
        metric = "eval_" + (self.metric_for_best_model or "loss").removeprefix("eval_")
        if self.greater_is_better is None:
            return metric, not metric.endswith("loss")
        return metric, self.greater_is_better


def steps_of(setting: float, total_steps: int) -> int:
    """What save_steps, eval_steps, logging_steps or warmup_steps says of a run of so many steps.

    Below 1 it is a share of the run, rounded up, as in transformers' TrainerState.compute_steps and
    TrainingArguments.get_warmup_steps.
    """
    return int(setting) if setting >= 1 else math.ceil(total_steps * setting)


# The groups of settings, in the order of --help, by their names in Settings.
GROUPS: Mapping[str, type[Any]] = {
    "model": ModelSettings,
    "method": MethodSettings,
    "data": DataSettings,
    "train": TrainSettings,
}


def all_settings() -> Iterator[tuple[str, Field[Any]]]:
    """Every setting as (group, field), group being one of GROUPS."""
    for group, declaration in GROUPS.items():
        for item in fields(declaration):
            yield group, item
