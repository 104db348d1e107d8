"""Keys that are no settings: refused with the remedy, ignored in one line, or unknown."""

from __future__ import annotations

from pathlib import Path

import pytest

from minilora.settings.foreign_keys import IGNORED, REFUSED
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
    "quantization_bit: 4": "'4' is not supported: remove it; the frozen weights stay bf16",
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
    groups = [settings, set(REFUSED), set(IGNORED)]
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
