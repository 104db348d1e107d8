"""The DeepSpeed file: LLaMA-Factory's works unchanged, what contradicts the run is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from minilora.files.deepspeed_file import (
    Facts,
    find_ds_config,
    read_deepspeed_files,
    resolve_ds_config,
    zero_stage,
)
from minilora.settings.errors import RequestError
from minilora.settings.settings import TrainSettings
from tests.support.article import example_shape

# LLaMA-Factory's examples/deepspeed/ds_z3_config.json.
LLAMA_FACTORY: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
TRAIN = TrainSettings(per_device_train_batch_size=4, gradient_accumulation_steps=4)
SHAPE = example_shape("llama-3.1-8b")
FACTS = Facts(world_size=7, shape=SHAPE, bf16=True)


def resolve(tmp_path: Path, config: Any, train: TrainSettings = TRAIN) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return resolve_ds_config(path, train, FACTS)


def test_llama_factorys_file_gets_the_values_of_the_hf_trainer(tmp_path: Path) -> None:
    mine = resolve(tmp_path, LLAMA_FACTORY)
    theirs = HfTrainerDeepSpeedConfig(json.loads(json.dumps(LLAMA_FACTORY)))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=4,
        bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(), report_to=[],
    )  # fmt: skip
    theirs.trainer_config_process(arguments)

    class Model:
        class config:  # noqa: N801 (the attribute's name in transformers)
            hidden_size = 4096

    theirs.trainer_config_finalize(arguments, Model, 100)
    # DeepSpeed's own way of saving weights is the one key that means nothing here.
    del theirs.config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    assert mine["zero_optimization"] == theirs.config["zero_optimization"]
    assert mine["gradient_clipping"] == theirs.config["gradient_clipping"] == 1.0
    assert mine["bf16"] == {"enabled": True} and "fp16" not in mine
    # One DeepSpeed micro-step per optimizer step: accumulation happens inside ours.
    assert mine["train_micro_batch_size_per_gpu"] == 16
    assert mine["gradient_accumulation_steps"] == 1 and "train_batch_size" not in mine


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_batch_size": 16}, ["train_batch_size is 16", "112", 'write "auto"']),
        ({"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps is 2", "say 4"]),
        ({"gradient_clipping": 0.3}, ["gradient_clipping is 0.3", "say 1.0"]),
        ({"bf16": {"enabled": False}}, ["bf16.enabled is false", "say true"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled", "bf16 or fp32"]),
        ({"optimizer": {"type": "Lion"}}, ["optimizer.type is Lion", "AdamW"]),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            ["optimizer.params.lr is 0.001", "5e-05"],
        ),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler: remove it", "lr_scheduler_type"]),
        ({"wandb": {"project": "auto"}}, ["wandb.project", '"auto" is not known here']),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, ["grad_accum_dtype", "of the run, bf16"]),
    ],
)
def test_what_contradicts_the_run_is_refused(
    tmp_path: Path, change: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(RequestError) as refused:
        resolve(tmp_path, {**LLAMA_FACTORY, **change})
    assert len(refused.value.problems) == 1
    assert all(word in str(refused.value) for word in [*words, "ds.json"])


def test_report_to_switches_deepspeeds_monitors_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = TrainSettings(output_dir="out", report_to=("tensorboard", "wandb"))
    own = {"wandb": {"project": "mine", "team": "ours"}}
    missing = "^report_to tensorboard .* pip install tensorboard\nreport_to wandb .* install wandb$"
    with pytest.raises(RequestError, match=missing):
        resolve(tmp_path, own, train)
    for package in ("tensorboard", "wandb"):
        (tmp_path / "site" / package).mkdir(parents=True)
        (tmp_path / "site" / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    config = resolve(tmp_path, own, train)
    assert config["tensorboard"] == {"enabled": True, "output_path": "out", "job_name": "runs"}
    assert config["wandb"] == {"enabled": True, "project": "mine", "team": "ours"}
    assert "comet" not in config and "wandb" not in resolve(tmp_path, {}, TRAIN)


def test_a_file_that_says_nothing_leaves_it_to_the_settings(tmp_path: Path) -> None:
    """DeepSpeed's own defaults: no clipping, no bf16, its own Adam for offloaded states."""
    assert resolve(tmp_path, {"train_batch_size": 112}) == {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "steps_per_print": 10**9,
        "zero_force_ds_cpu_optimizer": False,
    }


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as refused:
        resolve(tmp_path, {**LLAMA_FACTORY, "scheduler": {}, "gradient_clipping": 9})
    assert len(refused.value.problems) == 2


def test_an_agreeing_optimizer_section_is_ours_to_make(tmp_path: Path) -> None:
    section = {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999], "eps": "auto"}}
    assert "optimizer" not in resolve(tmp_path, {**LLAMA_FACTORY, "optimizer": section})


def test_shipped_files_are_found_by_name_and_strangers_are_not(tmp_path: Path) -> None:
    stages = {"zero0": 0, "zero2": 2, "zero3": 3, "zero3_nodes": 3, "zero3_offload": 3}
    for name, stage in stages.items():
        for spelled in (name, f"{name}.json"):
            path = find_ds_config(spelled)
            for world in (1, 3, 7):
                facts = Facts(world, SHAPE, bf16=True)
                assert zero_stage(resolve_ds_config(path, TRAIN, facts)) == stage
    assert find_ds_config(None) == find_ds_config("zero3")
    with pytest.raises(RequestError, match="shipped with minilora: zero0, zero2, zero3, zero3_no"):
        find_ds_config("ds_z3_config.json")
    own = tmp_path / "zero3.json"
    own.write_text("{}", encoding="utf-8")
    assert find_ds_config(str(own)) == own


def test_the_file_that_is_asked_for_comes_first_and_the_shipped_ones_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the user's with the name of a shipped one takes its place, if it is asked for."""
    monkeypatch.chdir(tmp_path)
    names = ["zero0", "zero2", "zero3", "zero3_offload"]
    for name in names:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    found = read_deepspeed_files(TrainSettings(deepspeed="zero2.json"), FACTS)
    assert list(found) == ["zero2", "zero0", "zero3", "zero3_offload"]
    assert [zero_stage(config) for config in found.values()] == [2, 0, 3, 3]
    own = read_deepspeed_files(TrainSettings(deepspeed="zero2"), FACTS)
    assert list(own) == list(found) and zero_stage(own["zero2"]) == 0


def test_broken_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    for text, message in (("{", "ds.json:1: not JSON"), ("[]", "a JSON object is needed")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(RequestError, match=message):
            resolve_ds_config(path, TRAIN, FACTS)
