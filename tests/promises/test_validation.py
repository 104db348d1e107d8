"""Validation: the loss of transformers + PEFT, the same on any ranks, and no step is changed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minilora.settings.command_line import read_settings
from tests.support.oracle import validation_of
from tests.support.prepared import prepared_of
from tests.support.runs import Ground, adapter, log, run_jobs, stage_file, write_rows

Jobs = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def validated(ground: Ground, launch: Callable[..., tuple[int, str]]) -> Jobs:
    """The same 4 steps of 6 rows on 1 and 3 ranks, validated every second step, and not at all."""
    write_rows(ground.folder / "held.jsonl", 11)
    common = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_dataset": str(ground.folder / "held.jsonl"),
    }
    jobs = {
        f"{ranks}": ground.job(
            f"validated-{ranks}", "tiny", per_device_train_batch_size=6 // ranks,
            deepspeed=str(stage_file(ground.folder, stage)), **common,
        )
        for ranks, stage in ((1, 0), (3, 3))
    }  # fmt: skip
    jobs["dropout"] = {**jobs["1"], "lora_dropout": 0.2}
    jobs["dropout"]["output_dir"] = str(ground.folder / "validated-dropout")
    jobs["share"] = {**jobs["1"], "eval_dataset": "", "val_size": 0.2}
    jobs["share"] |= {"output_dir": str(ground.folder / "validated-share"), "max_steps": 2}
    del jobs["share"]["eval_dataset"]
    still = {
        **common,
        "max_steps": 1,
        "warmup_steps": 0,
        "learning_rate": 1e-30,
    }  # all score the start's adapter
    jobs["still"] = ground.job("still", "tiny", **still, deepspeed=jobs["1"]["deepspeed"])
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "tile_tokens": 40}
    jobs["small"] = {**jobs["still"], **small, "gather_tokens": 70, "packing": True}
    jobs["small-3"] = {**jobs["small"], "deepspeed": jobs["3"]["deepspeed"]}
    for name in ("small", "small-3"):
        jobs[name]["output_dir"] = str(ground.folder / name)
    jobs["none"] = {
        **jobs["dropout"],
        "eval_strategy": "no",
        "output_dir": str(ground.folder / "unseen"),
    }
    del jobs["none"]["eval_dataset"]
    jobs["epochs"] = {**jobs["1"], "per_device_train_batch_size": 25, "max_steps": 5}
    jobs["epochs"] |= {"eval_strategy": "epoch", "save_strategy": "epoch"}
    jobs["epochs"]["output_dir"] = str(ground.folder / "epochs")
    names = ("1", "dropout", "share", "none", "still", "small", "epochs")
    run_jobs(launch, 1, [jobs[name] for name in names])
    run_jobs(launch, 3, [jobs["3"], jobs["small-3"]])
    return jobs


def scores(job: dict[str, Any], key: str) -> list[float]:
    lines = (Path(job["output_dir"]) / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line[key] for line in map(json.loads, lines) if key in line]


def test_loss_perplexity_and_accuracy_are_those_of_peft(validated: Jobs) -> None:
    job = validated["dropout"]
    loss, accuracy = validation_of(job)
    assert scores(job, "current_steps")[-1] == 4
    assert scores(job, "eval_loss")[-1] == pytest.approx(loss, rel=1e-6)
    assert scores(job, "eval_accuracy")[-1] == pytest.approx(accuracy, abs=1e-9)
    perplexity = math.exp(loss)
    assert scores(job, "eval_perplexity")[-1] == pytest.approx(perplexity, rel=1e-4)


def test_any_number_of_ranks_and_stage_gives_the_same_loss(validated: Jobs) -> None:
    one, three = scores(validated["1"], "eval_loss"), scores(validated["3"], "eval_loss")
    assert len(one) == len(three) == 2
    assert one == pytest.approx(three, rel=1e-6)


def test_batch_packing_and_tiles_do_not_change_the_loss(validated: Jobs) -> None:
    (expected,) = scores(validated["still"], "eval_loss")
    for name in ("small", "small-3"):
        assert scores(validated[name], "eval_loss") == pytest.approx([expected], rel=1e-6)


def test_strategies_of_epochs_act_at_their_ends_and_at_the_last_step(validated: Jobs) -> None:
    """75 rows in steps of 25, of which 5."""
    job, folder = validated["epochs"], Path(validated["epochs"]["output_dir"])
    lines = map(json.loads, (folder / "trainer_log.jsonl").read_text().splitlines())
    assert [line["current_steps"] for line in lines if "eval_loss" in line] == [3, 5]
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-5"}
    assert len(scores(job, "loss")) == 5


def test_validation_changes_no_step(validated: Jobs) -> None:
    assert scores(validated["dropout"], "loss") == log(validated["none"], "loss")
    for name, tensor in adapter(validated["none"]).items():
        assert torch.equal(adapter(validated["dropout"])[name], tensor)


def test_a_share_is_held_out_and_never_trained_on(validated: Jobs) -> None:
    settings = read_settings(
        [f"--{key}={value}" for key, value in validated["share"].items()], "train"
    )
    prepared = prepared_of(settings)
    whole = prepared_of(
        read_settings([f"--{k}={v}" for k, v in validated["none"].items()], "train")
    ).documents

    def texts(documents: Any) -> list[bytes]:
        edges = zip(documents.offsets[:-1], documents.offsets[1:], strict=True)
        return [documents.tokens[a:b].tobytes() for a, b in edges]

    train, held = texts(prepared.documents), texts(prepared.validation)
    assert len(held) == 15 and len(train) == 60  # a fifth of 75
    assert sorted(train + held) == sorted(texts(whole))
    assert len(scores(validated["share"], "eval_loss")) == 1
