"""Every setting of a run: its name, default, meaning and check.

The names and defaults are LLaMA-Factory's and the Hugging Face Trainer's; where a default is
ours the help text says so.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field
from pathlib import Path
from typing import Any

from minilora.settings.errors import RequestError as RequestError
from minilora.settings.errors import RunError as RunError
from minilora.settings.errors import shortened as shortened
from minilora.settings.fields import setting, value_problems


# A table: a line or two for each setting.
# fmt: off
@dataclass(frozen=True)
class ModelSettings:
    """Which weights are trained, and how their attention is computed."""

    model_name_or_path: str | None = setting(
        None, "Folder of the base model: config.json, *.safetensors and the tokenizer. Required.")
    adapter_name_or_path: str | None = setting(
        None, "Folder of a PEFT LoRA adapter to continue from; its step counter starts at 0.")
    flash_attn: str = setting(
        "auto", "Attention kernel: auto takes the fastest that works; all give the same numbers.",
        choices=("auto", "disabled", "sdpa", "fa2"))
    disable_gradient_checkpointing: bool = setting(
        False, "Keep all activations instead of recomputing each block: faster, far more memory.")


@dataclass(frozen=True)
class MethodSettings:
    """What is learned: the objective and the shape of the adapter."""

    stage: str = setting("sft", "sft trains on answers, pt on plain text.", choices=("sft", "pt"))
    lora_rank: int = setting(8, "Rank r of each LoRA pair.", at_least=1)
    lora_alpha: int | None = setting(
        None, "LoRA strength: the update is scaled by alpha / rank. Default: 2 x rank.", at_least=1)
    lora_dropout: float = setting(
        0.0, "Share of the inputs of each LoRA pair dropped in training.", at_least=0, below=1)
    lora_target: tuple[str, ...] = setting(
        ("all",), "Layers that get a LoRA pair: all, names such as q_proj,v_proj, or one regular "
        "expression for whole paths.", pattern=True)
    use_rslora: bool = setting(False, "rsLoRA: scale the update by alpha / sqrt(rank).")
    use_dora: bool = setting(False, "DoRA: learn the length of each weight row beside LoRA.")
    rank_pattern: dict[str, int] | None = setting(
        None, "Other ranks by path: {PATTERN: RANK, ...}, a pattern matching a path's end.")
    alpha_pattern: dict[str, int] | None = setting(
        None, "Other alphas by path, written like rank_pattern.")
    additional_target: tuple[str, ...] | None = setting(
        None, "Trained whole beside LoRA: lm_head, embed_tokens or both (PEFT: modules_to_save).")

    @property
    def alpha(self) -> int:
        """lora_alpha, or its default of twice the rank."""
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha


@dataclass(frozen=True)
class DataSettings:
    """Which rows are trained on, and how they become tokens."""

    dataset: tuple[str, ...] = setting(
        (), "Names from dataset_info.json and/or .json, .jsonl, .txt files. Required to train.")
    eval_dataset: tuple[str, ...] | None = setting(
        None, "Datasets to validate with, named like dataset."
    )
    val_size: float = setting(
        0.0, "Rows (1 or more), or the share of them, held out to validate with.", at_least=0
    )
    dataset_dir: str = setting("data", "Folder of dataset_info.json and of the files it names.")
    template: str | None = setting(
        None, "Chat template, such as llama3. Default: the one that came with the base model.")
    default_system: str | None = setting(
        None, "System message of conversations that have none. Default: the template's own.")
    cutoff_len: int = setting(2048, "Longest conversation, in tokens; the rest is cut.", at_least=2)
    train_on_prompt: bool = setting(False, "Learn the questions too, not only the answers.")
    mask_history: bool = setting(False, "Learn only the last answer of each conversation.")
    packing: bool | None = setting(
        None, "Fill each row of a batch up to cutoff_len with documents. Default: only for pt.")
    max_samples: int | None = setting(None, "Use the first N rows of each dataset.", at_least=1)


@dataclass(frozen=True)
class TrainSettings:
    """How long, how fast and in which steps to train, and what to write."""

    output_dir: str | None = setting(None, "Folder for everything the run writes. Required.")
    overwrite_output_dir: bool = setting(False, "Write into output_dir though it holds a run.")
    per_device_train_batch_size: int = setting(
        8, "Documents of one GPU per micro-batch; decides the step, not the memory.", at_least=1)
    gradient_accumulation_steps: int = setting(
        1, "Micro-batches per optimizer step; decides the step, not the memory.", at_least=1)
    learning_rate: float = setting(5e-5, "Highest learning rate.", above=0)
    num_train_epochs: float = setting(3.0, "Passes over the data.", above=0)
    max_steps: int = setting(
        -1, "Stop after this many optimizer steps, whatever num_train_epochs says.", at_least=-1)
    lr_scheduler_type: str = setting(
        "linear", "How the learning rate falls after the warm-up.",
        choices=("linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
                 "constant_with_warmup", "inverse_sqrt"))
    warmup_ratio: float = setting(
        0.0, "Share of the steps in which the learning rate rises.", at_least=0, at_most=1)
    warmup_steps: int = setting(
        0, "Steps in which the learning rate rises; overrides warmup_ratio.", at_least=0)
    weight_decay: float = setting(0.0, "AdamW weight decay.", at_least=0)
    max_grad_norm: float = setting(1.0, "Clip the gradient to this norm; 0 = never.", at_least=0)
    adam_beta1: float = setting(0.9, "AdamW beta1.", at_least=0, below=1)
    adam_beta2: float = setting(0.999, "AdamW beta2.", at_least=0, below=1)
    adam_epsilon: float = setting(1e-8, "AdamW epsilon.", above=0)
    loraplus_lr_ratio: float | None = setting(
        None, "LoRA+: learning rate of each lora_B, as a multiple of learning_rate.", above=0)
    optim: str = setting("adamw_torch", "Optimizer.", choices=("adamw_torch", "adamw_torch_fused"))
    bf16: bool | None = setting(None, "Compute in bfloat16. Default: on a GPU yes, on a CPU no.")
    seed: int = setting(
        42, "Seed of data order, LoRA start and dropout.", at_least=0, at_most=2**32 - 1)
    disable_shuffling: bool = setting(False, "Keep the rows in the order of the files.")
    logging_steps: int = setting(
        10, "Steps per line of trainer_log.jsonl (10 is ours; the Trainer's is 500).", at_least=1)
    save_strategy: str = setting(
        "steps", "When to write a snapshot to resume from.", choices=("steps", "epoch", "no"))
    save_steps: int = setting(500, "Steps per snapshot with save_strategy steps.", at_least=1)
    save_only_model: bool = setting(False, "Snapshots hold the adapter only: smaller, no resume.")
    save_total_limit: int | None = setting(
        None, "Keep only the newest N snapshots. Default: all.", at_least=1)
    resume_from_checkpoint: str | None = setting(
        None, "true: go on from the newest snapshot in output_dir, if any; or a snapshot's folder.")
    eval_strategy: str = setting(
        "no", "When to validate.", choices=("no", "steps", "epoch")
    )
    eval_steps: int | None = setting(
        None, "Steps per validation with eval_strategy steps; default logging_steps.", at_least=1
    )
    report_to: tuple[str, ...] = setting(
        ("none",), "Send the figures there too; the program's package must be installed.",
        choices=("none", "tensorboard", "wandb", "comet_ml"))
    load_best_model_at_end: bool = setting(
        False, "Leave the adapter that validated best in output_dir, not the last one.")
    metric_for_best_model: str | None = setting(
        None, "By what the best is found. Default: eval_loss.",
        choices=("eval_loss", "loss", "eval_accuracy", "accuracy"))
    greater_is_better: bool | None = setting(
        None, "Whether more of that metric is better. Default: yes, unless it is a loss.")
    early_stopping_steps: int | None = setting(
        None, "Stop after this many validations in a row without a better one.", at_least=1)
    plot_loss: bool = setting(True, "Draw training_loss.png (on is ours; needs matplotlib).")
    deepspeed: str | None = setting(
        None, "DeepSpeed's JSON file. Default: the zero3.json that comes with minilora.")
    # 1e9 s is where a timeout in nanoseconds still fits 64 bits.
    ddp_timeout: int = setting(
        1800, "Seconds a rank waits for the others.", at_least=1, at_most=10**9)
    tile_tokens: int = setting(
        2048, "Ours: tokens a block computes at a time; bounds its working memory.", at_least=1)
    gather_tokens: int | None = setting(
        None, "Ours: tokens per gather of a block; bounds saved inputs. Default: the whole step.",
        at_least=1)
    loss_tokens: int = setting(
        1024, "Ours: labelled tokens whose logits exist at one time in the loss.", at_least=1)
    offload_activations: bool = setting(
        False, "Ours: keep the blocks' inputs in host memory between forward and backward.")
    strict_plan: bool = setting(
        False, "Ours: refuse a run of which the memory plan says that it does not fit.")
    memory_snapshot: bool = setting(
        False, "Ours: when a GPU runs out of memory, write torch's history of it to output_dir.")
    keep_blocks: int | None = setting(
        None, "Ours: last blocks that keep their activations, not recomputed. Default: what fits.",
        at_least=0)
    verbose_deepspeed: bool = setting(False, "Ours: print DeepSpeed's own log lines too.")

    def computes_in_bf16(self, on_gpu: bool) -> bool:
        """The bf16 setting, or its default: bf16 on a GPU, fp32 on a CPU."""
        return on_gpu if self.bf16 is None else self.bf16

    @property
    def eval_every(self) -> int:
        """eval_steps, or its default of logging_steps."""
        return self.eval_steps or self.logging_steps

    @property
    def judged_by(self) -> tuple[str, bool]:
        """The metric that says which model is best, as in the log, and whether more is better."""
        key = "eval_" + (self.metric_for_best_model or "loss").removeprefix("eval_")
        greater = self.greater_is_better
        return key, not key.endswith("loss") if greater is None else greater
# fmt: on


@dataclass(frozen=True)
class Settings:
    """All settings of one run, checked together.

    notices: lines to show once, such as which known keys were ignored
    origins: key -> where its value came from, for the keys that were given

    Raises RequestError with every problem of every setting.
    """

    model: ModelSettings = ModelSettings()
    method: MethodSettings = MethodSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    notices: tuple[str, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = self.to_dict()
        problems = [
            problem
            for _, item in all_settings()
            for problem in value_problems(item, values[item.name], self.name_of(item.name))
        ]
        if problems := problems or self._joint_problems():
            raise RequestError(problems)

    @property
    def base(self) -> Path:
        """The folder of the base model; the commands that need it require the key."""
        assert self.model.model_name_or_path, "required by read_settings"
        return Path(self.model.model_name_or_path)

    @property
    def output(self) -> Path:
        """The folder that a run writes into; training requires the key."""
        assert self.train.output_dir, "required by read_settings"
        return Path(self.train.output_dir)

    @property
    def packs(self) -> bool:
        """packing, or its default: yes for plain text, no for conversations."""
        return self.method.stage == "pt" if self.data.packing is None else self.data.packing

    @property
    def keeps_what_fits(self) -> bool:
        """Whether as many blocks keep their activations as fit: no number is asked, nor all."""
        return self.train.keep_blocks is None and not self.model.disable_gradient_checkpointing

    def to_dict(self) -> dict[str, Any]:
        """Every key and value, flat and in the order of --help."""
        return {
            item.name: getattr(getattr(self, group), item.name) for group, item in all_settings()
        }

    def name_of(self, key: str) -> str:
        """The key as messages name it: with the place its value came from."""
        return f"{key} ({self.origins[key]})" if key in self.origins else key

    def _joint_problems(self) -> list[str]:
        data, targets, name = self.data, self.method.lora_target, self.name_of
        held_out = bool(data.eval_dataset or data.val_size)
        gather, tile = self.train.gather_tokens, self.train.tile_tokens
        train, judges = self.train, "load_best_model_at_end"
        validates = train.eval_strategy != "no"
        held = "eval_dataset" if data.eval_dataset else "val_size"
        loads = train.load_best_model_at_end and validates
        wrong = {
            f"{name('mask_history')} and {name('train_on_prompt')} contradict each other: "
            "set one of them to false": data.mask_history and data.train_on_prompt,
            f"{name('lora_target')}: all already means every layer; give all alone, or only names":
                "all" in targets and len(targets) > 1,
            f"{name('gather_tokens')}: {gather} is less than tile_tokens {tile}; raise it or lower "
            "tile_tokens": gather is not None and gather < tile,
            f"{name('offload_activations')} moves what recomputing starts from: set "
            "disable_gradient_checkpointing to false":
                self.train.offload_activations and self.model.disable_gradient_checkpointing,
            f"{name('disable_gradient_checkpointing')} keeps every block; remove "
            f"{name('keep_blocks')}": self.model.disable_gradient_checkpointing
                and self.train.keep_blocks is not None,
            f"{name('eval_strategy')}: nothing to validate with; give eval_dataset or val_size":
                self.train.eval_strategy != "no" and not held_out,
            f"{name(held)}: nothing validates with these rows; set eval_strategy: epoch, or "
            "steps, or remove the key": held_out and not validates,
            f"{name('eval_dataset')} and {name('val_size')}: give one of them":
                bool(data.eval_dataset and data.val_size),
            f"{name('early_stopping_steps')} counts validations: set eval_strategy":
                bool(train.early_stopping_steps) and not validates,
            f"{name(judges)} needs validations: set eval_strategy":
                train.load_best_model_at_end and not validates,
            # The next two are the HF Trainer's.
            f"{name(judges)}: {name('save_strategy')} and {name('eval_strategy')} must be the same":
                loads and train.save_strategy != train.eval_strategy,
            f"{name(judges)}: {name('save_steps')} must be a multiple of eval_steps, which is "
            f"{train.eval_every}":
                loads and train.save_strategy == train.eval_strategy == "steps"
                and train.save_steps % train.eval_every > 0,
        }  # fmt: skip
        return [problem for problem, found in wrong.items() if found]


# The fields of Settings that hold settings, in the order of --help.
GROUPS: Mapping[str, type[Any]] = {
    "model": ModelSettings,
    "method": MethodSettings,
    "data": DataSettings,
    "train": TrainSettings,
}


def all_settings() -> Iterator[tuple[str, "Field[Any]"]]:
    """Every setting as (group, field), group being one of GROUPS."""
    for group, declaration in GROUPS.items():
        for item in dataclasses.fields(declaration):
            yield group, item
