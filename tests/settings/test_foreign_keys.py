"""Keys that are no settings: refused with the remedy, ignored in one line, or unknown."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from transformers import Seq2SeqTrainingArguments

from minilora.settings.foreign_keys import (
    ALIASES,
    EXPLAINED,
    IGNORED,
    IGNORED_PREFIXES,
    REFUSED,
)
from minilora.settings.keys import all_settings
from tests.support.settings_files import (
    NEEDED,
    check_argument,
    check_line_of_a_file,
    plain,
    problems_of,
    read,
)

# One line of YAML -> what the message must say besides the key and its line.
REFUSED_VALUES = {
    "quantization_type: fp4": "'fp4' is not supported: use nf4, the only kind of 4 bits here",
    "quantization_method: hqq": "'hqq' is not supported: use bnb with quantization_bit: 4",
    "quantization_method: eetq": "'eetq' is not supported: use bnb with quantization_bit: 4",
    "quantization_method: gptq": "'gptq' is not supported: use bnb with quantization_bit: 4",
    "finetuning_type: full": "'full' is not supported: set it to lora",
    "finetuning_type: freeze": "'freeze' is not supported: set it to lora",
    "do_train: false": "'false' is not supported: set it to true",
    "do_predict: true": "use minilora.generate after the training",
    "fp16: true": "'true' is not supported: use bf16: true",
    "pure_bf16: true": "use bf16: true",
    "pissa_init: true": "LoRA starts as PEFT starts it",
    "use_galore: true": "use optim: adamw_torch",
    "use_unsloth: true": "use_unsloth works on one GPU only",
    "streaming: true": "remove it",
    "rope_scaling: yarn": "set it in the config.json of the base model",
    "report_to: mlflow": "'mlflow' is not one of none, tensorboard, wandb, comet_ml",
    "report_to: trackio": "'trackio' is not one of none, tensorboard, wandb, comet_ml",
    "report_to: [wandb, all]": "'all' is not one of none, tensorboard, wandb, comet_ml",
    "mix_strategy: interleave_over": "bring the datasets to the sizes you want",
    "neftune_noise_alpha: 5": "'5' is not supported: remove it",
    "label_smoothing_factor: 0.1": "the loss is plain cross-entropy",
    "max_seq_length: 512": "set cutoff_len",
    "lr_scheduler_kwargs: {num_cycles: 2}": "each schedule has its standard shape",
    "new_special_tokens: <think>": "use tokens that the tokenizer already has",
    "preserve_thinking: true": "the chat template decides",
    "master_port: 29500": "give it to torchrun or deepspeed",
    "optim: paged_adamw_8bit": "'paged_adamw_8bit' is not supported: use adamw_torch",
}
TYPING_ERRORS = {
    "lora_rnak: 8": "is not a known key: did you mean lora_rank?",
    "lora-rank: 8": "is not a known key: did you mean lora_rank?",
    "Lora_rank: 8": "is not a known key: did you mean lora_rank?",
    "learning_rte: 1": "is not a known key: did you mean learning_rate?",
    "eval_stratgy: steps": "is not a known key: did you mean eval_strategy?",
    "quantisation_bit: 4": "is not a known key: did you mean quantization_bit?",
    "zzz: 1": "is not a known key: --help lists every key",
    "<<: {lora_rank: 8}": "is not a known key",
    "8: lora_rank": "is not a known key",
}
WRONG_LINES = {**REFUSED_VALUES, **TYPING_ERRORS}


@pytest.mark.parametrize("line", WRONG_LINES)
def test_wrong_key_in_the_file(tmp_path: Path, line: str) -> None:
    check_line_of_a_file(tmp_path, line, WRONG_LINES[line])


@pytest.mark.parametrize("line", plain(WRONG_LINES))
def test_wrong_key_on_the_command_line(tmp_path: Path, line: str) -> None:
    check_argument(tmp_path, line, WRONG_LINES[line])


@pytest.mark.parametrize("key", REFUSED)
def test_refused_keys_have_harmless_values(tmp_path: Path, key: str) -> None:
    for harmless in ("null", *REFUSED[key].harmless):
        assert read(tmp_path, f"{NEEDED}{key}: {harmless}\n").notices == ()
    (problem,) = problems_of(tmp_path, f"{NEEDED}{key}: 7\n")
    assert problem.endswith(REFUSED[key].remedy)


def test_no_key_has_two_fates() -> None:
    settings = {item.name for _, item in all_settings()}
    groups = [settings, set(REFUSED), set(IGNORED), set(ALIASES), set(EXPLAINED)]
    assert len(set().union(*groups)) == sum(len(group) for group in groups)


def test_ignored_keys_share_one_line(tmp_path: Path) -> None:
    text = NEEDED + "trust_remote_code: true\nvllm_maxlen: 4096\nper_device_eval_batch_size: 1\n"
    (notice,) = read(tmp_path, text).notices
    keys = "per_device_eval_batch_size, trust_remote_code, vllm_maxlen"
    assert notice == f"ignored, they mean nothing here: {keys}"


@pytest.mark.parametrize("value", ["auto", "disabled", "sdpa", "fa2", "fa3"])
def test_no_attention_kernel_changes_what_is_learned(tmp_path: Path, value: str) -> None:
    settings = read(tmp_path, f"{NEEDED}flash_attn: {value}\n")
    assert settings.notices == ("ignored, they mean nothing here: flash_attn",)
    assert "flash_attn" not in settings.to_dict()


@pytest.mark.parametrize("value", ["adamw_torch", "adamw_torch_fused"])
def test_adamw_of_torch_is_taken_in_silence(tmp_path: Path, value: str) -> None:
    settings = read(tmp_path, f"{NEEDED}optim: {value}\n")
    assert settings.notices == ()
    assert "optim" not in settings.to_dict()


def test_notices_for_what_is_taken_otherwise(tmp_path: Path) -> None:
    text = NEEDED + "neat_packing: true\nlr_scheduler_type: constant\nwarmup_ratio: 0.1\n"
    assert read(tmp_path, text).notices == (
        "neat_packing means packing: packed documents never see each other here",
        "lr_scheduler_type constant has no warm-up; see constant_with_warmup",
    )


def test_every_key_of_the_hf_trainer_has_a_fate() -> None:
    """A key that a new release of transformers brings shows here."""
    known = (
        {item.name for _, item in all_settings()}
        | REFUSED.keys()
        | IGNORED
        | ALIASES.keys()
        | EXPLAINED.keys()
    )
    theirs = {item.name for item in dataclasses.fields(Seq2SeqTrainingArguments) if item.init}
    strangers = {key for key in theirs - known if not key.startswith(IGNORED_PREFIXES)}
    assert strangers == {"local_rank"}  # launchers add it, and read_settings takes it off


def test_the_older_name_of_eval_strategy_is_taken(tmp_path: Path) -> None:
    text = f"{NEEDED}evaluation_strategy: steps\nval_size: 0.1\n"
    settings = read(tmp_path, text)
    assert settings.train.eval_strategy == "steps" and settings.notices == ()
    assert read(tmp_path, f"{text}eval_strategy: steps\n").train.eval_strategy == "steps"
    assert read(tmp_path, f"{NEEDED}evaluation_strategy: 'no'\n").train.eval_strategy == "no"
    (problem,) = problems_of(tmp_path, f"{text}eval_strategy: epoch\n")
    assert "evaluation_strategy" in problem and "older name of eval_strategy" in problem


@pytest.mark.parametrize(
    "line", ["evalstrategy: steps", "eval_strategy: [steps]", "eval_strategie: steps"]
)
def test_a_key_that_cannot_be_read_causes_no_second_error(tmp_path: Path, line: str) -> None:
    """By its default nothing would validate with val_size, which says nothing of the request."""
    (problem,) = problems_of(tmp_path, f"{NEEDED}val_size: 0.1\n{line}\n")
    assert line.partition(":")[0] in problem
    both = problems_of(tmp_path, f"{NEEDED}val_size: 0.1\nlora_rnak: 8\n")
    assert len(both) == 2, "what has nothing to do with the misspelt key is still told"


def test_an_empty_list_that_asks_for_nothing_is_none(tmp_path: Path) -> None:
    settings = read(tmp_path, f"{NEEDED}report_to: []\neval_dataset: []\nadditional_target: []\n")
    assert settings.train.report_to == ("none",)
    assert settings.data.eval_dataset is settings.method.additional_target is None
    assert read(tmp_path, NEEDED, "--report_to", "[]").train.report_to == ("none",)
    (problem,) = problems_of(tmp_path, f"{NEEDED}lora_target: []\n")
    assert "[] is not a list of names" in problem


# LLaMA-Factory's examples/train_lora, examples/extras and examples/ascend for LoRA, by their keys.
MODEL = "model_name_or_path: m\ntrust_remote_code: true\n"
SFT = "stage: sft\ndo_train: true\nfinetuning_type: lora\nlora_rank: 8\nlora_target: all\n"
PT = SFT.replace("sft", "pt")
DATA = "dataset: identity,alpaca_en_demo\ntemplate: llama3\ncutoff_len: 2048\nmax_samples: 1000\n"
CACHE = "overwrite_cache: true\npreprocessing_num_workers: 16\ndataloader_num_workers: 4\n"
OUTPUT = (
    "output_dir: saves/sft\nlogging_steps: 10\nsave_steps: 500\nplot_loss: true\n"
    "overwrite_output_dir: true\nsave_only_model: false\nreport_to: none\n"
)
TRAIN = (
    "per_device_train_batch_size: 1\ngradient_accumulation_steps: 8\nlearning_rate: 1.0e-4\n"
    "num_train_epochs: 3.0\nlr_scheduler_type: cosine\nwarmup_ratio: 0.1\nbf16: true\n"
    "ddp_timeout: 180000000\nresume_from_checkpoint: null\n"
)
EVAL = "val_size: 0.1\nper_device_eval_batch_size: 1\neval_strategy: steps\neval_steps: 500\n"
PLAIN = MODEL + SFT + DATA + CACHE + OUTPUT + TRAIN
EXAMPLES = {
    "sft": PLAIN,
    "sft with validation": PLAIN + EVAL,
    "sft, older keys": PLAIN + EVAL.replace("eval_strategy", "evaluation_strategy"),
    "pretrain": MODEL + PT + DATA.replace("template: llama3\n", "") + CACHE + OUTPUT + TRAIN,
    "sft_ds3": f"{PLAIN}deepspeed: examples/deepspeed/ds_z3_config.json\n",
    "sft_ray": f"{PLAIN}ray_run_name: llama3\nray_storage_path: ./saves\nray_num_workers: 4\n"
    "placement_strategy: PACK\nresources_per_worker:\n  GPU: 1\n",
    "loraplus": f"{PLAIN}loraplus_lr_ratio: 16.0\n",
    "warm-up as a share": PLAIN.replace("warmup_ratio", "warmup_steps"),
    "kernels": f"{PLAIN}flash_attn: fa2\nuse_v1_kernels: true\nenable_liger_kernel: true\n",
    "qlora (bnb)": f"{PLAIN}quantization_bit: 4\nquantization_method: bnb\n",
    "sft, swanlab and hub left off": f"{PLAIN}use_swanlab: false\npush_to_hub: false\n",
}
# Those that ask for something else, with the key that is refused.
ASKING = {
    "preprocess": (f"{PLAIN}tokenized_path: saves/dataset/sft\n", "tokenized_path"),
    "pissa": (f"{PLAIN}pissa_init: true\npissa_iter: 16\npissa_convert: true\n", "pissa_init"),
    "badam": (f"{PLAIN}use_badam: true\nbadam_mode: layer\n", "use_badam"),
    "dpo": (PLAIN.replace("sft", "dpo", 1) + "pref_beta: 0.1\npref_loss: sigmoid\n", "stage"),
    "kto": (PLAIN.replace("sft", "kto", 1) + "pref_beta: 0.1\n", "stage"),
    "kt": (f"{PLAIN}use_kt: true\nkt_optimize_rule: x\n", "use_kt"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_llama_factorys_examples_are_taken(name: str, tmp_path: Path) -> None:
    settings = read(tmp_path, EXAMPLES[name])
    assert all(notice.startswith("ignored, they mean nothing") for notice in settings.notices)
    if name == "warm-up as a share":
        assert settings.train.warmup_steps == 0.1


@pytest.mark.parametrize("name", ASKING)
def test_llama_factorys_examples_that_ask_for_more_are_refused_by_that_key(
    name: str, tmp_path: Path
) -> None:
    text, key = ASKING[name]
    (problem,) = problems_of(tmp_path, text)
    assert problem.startswith(f"{key} (")


def test_four_bits_as_llama_factory_asks_for_them(tmp_path: Path) -> None:
    for method in ("bnb", "bitsandbytes"):
        text = f"quantization_bit: 4\nquantization_type: nf4\nquantization_method: {method}\n"
        settings = read(tmp_path, f"{NEEDED}{text}double_quantization: true\n")
        assert settings.model.quantization_bit == 4
        assert settings.notices == (
            "double_quantization means nothing here: the scales of 4-bit weights stay exact, at "
            "0.12 bit more for a weight",
        )
    assert read(tmp_path, f"{NEEDED}double_quantization: false\n").notices == ()
