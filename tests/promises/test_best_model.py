"""The best model: found, kept, gone on from and left in output_dir, as the HF Trainer has it."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainerState

from minilora.files.adapter import WEIGHTS
from minilora.settings.command_line import read_settings
from minilora.settings.errors import RequestError
from minilora.settings.settings import TrainSettings
from minilora.training.best_model import Best, best_before
from tests.support.oracle import validation_of
from tests.support.runs import Ground, adapter, run_jobs, stage_file, write_rows

Jobs = dict[str, dict[str, Any]]
PATIENCE, CUT = 3, 5


@pytest.fixture(scope="session")
def judged(ground: Ground, launch: Callable[..., tuple[int, str]]) -> tuple[Jobs, str]:
    """A run that soon gets worse; one that a signal stops on the way and that goes on; 3 ranks."""
    write_rows(ground.folder / "judges.jsonl", 8)
    common = {
        "eval_dataset": str(ground.folder / "judges.jsonl"), "learning_rate": 0.1,
        "warmup_steps": 0, "lr_scheduler_type": "constant", "max_steps": 12,
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2,
        "save_total_limit": 1, "load_best_model_at_end": True, "early_stopping_steps": PATIENCE,
    }  # fmt: skip

    def job(name: str, ranks: int, **more: Any) -> dict[str, Any]:
        stage = str(stage_file(ground.folder, 0 if ranks == 1 else 3))
        size = 6 // ranks
        return ground.job(
            name, "tiny", per_device_train_batch_size=size, deepspeed=stage, **common, **more
        )

    jobs = {"whole": job("judged", 1), "3": job("judged-3", 3)}
    jobs["cut"] = job("judged-cut", 1, stop_after=CUT)
    jobs["on"] = job("judged-cut", 1, resume_from_checkpoint="true")
    jobs["elsewhere"] = job(
        "judged-else", 1, resume_from_checkpoint=f"{jobs['cut']['output_dir']}/checkpoint-{CUT}"
    )
    names = ("whole", "cut", "elsewhere", "on")
    output = run_jobs(launch, 1, [jobs[name] for name in names])
    run_jobs(launch, 3, [jobs["3"]])
    return jobs, output


def validations(job: dict[str, Any]) -> dict[int, float]:
    """Validation loss by step."""
    lines = (Path(job["output_dir"]) / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    found = [line for line in map(json.loads, lines) if "eval_loss" in line]
    return {line["current_steps"]: line["eval_loss"] for line in found}


def best_of(job: dict[str, Any]) -> tuple[int, float]:
    """What train_results.json says of the best step and its loss."""
    text = (Path(job["output_dir"]) / "train_results.json").read_text(encoding="utf-8")
    return json.loads(text)["best_global_step"], json.loads(text)["best_metric"]


def test_the_best_adapter_is_left_and_its_snapshot_kept(judged: tuple[Jobs, str]) -> None:
    jobs, output = judged
    job = jobs["whole"]
    losses, (step, loss) = validations(job), best_of(job)
    print(losses)
    assert loss == losses[step] == min(losses.values())
    assert list(losses) == list(range(1, step + PATIENCE + 1)), "stopped, with patience"
    folder = Path(job["output_dir"])
    kept = {path.name for path in folder.glob("checkpoint-*")}
    assert f"checkpoint-{step}" in kept and len(kept) == 2, "the limit is 1: the best and the last"
    for name, tensor in adapter({**job, "output_dir": str(folder / f"checkpoint-{step}")}).items():
        assert torch.equal(adapter(job)[name], tensor)
    assert f"best: step {step}, with eval_loss {loss:.6g}" in output
    assert f"no validation since step {step} was better" in output


def test_the_adapter_that_is_left_has_the_best_loss_in_peft(judged: tuple[Jobs, str]) -> None:
    job = judged[0]["whole"]
    assert validation_of(job)[0] == pytest.approx(best_of(job)[1], rel=1e-6)


def test_going_on_keeps_the_best_and_the_patience(judged: tuple[Jobs, str]) -> None:
    """The signal came before a validation, which is made up for."""
    jobs, _ = judged
    step, _ = best_of(jobs["whole"])
    assert step + 1 < CUT < step + PATIENCE, "there is something to forget"
    assert validations(jobs["on"]) == validations(jobs["whole"])
    later = {at: loss for at, loss in validations(jobs["whole"]).items() if at >= CUT}
    assert validations(jobs["elsewhere"]) == later
    for name in ("on", "elsewhere"):
        assert best_of(jobs[name]) == best_of(jobs["whole"])
        for key, tensor in adapter(jobs["whole"]).items():
            assert torch.equal(adapter(jobs[name])[key], tensor)


def test_any_number_of_ranks_finds_the_same_step(judged: tuple[Jobs, str]) -> None:
    jobs, _ = judged
    assert list(validations(jobs["3"])) == list(validations(jobs["whole"]))
    assert best_of(jobs["3"]) == pytest.approx(best_of(jobs["whole"]), rel=1e-3)


@pytest.mark.parametrize("greater", [False, True])
def test_best_and_patience_are_those_of_the_trainer(greater: bool) -> None:
    dice = random.Random(greater)
    for _ in range(50):
        values = [dice.choice([math.nan, 0.1, 0.2, 0.3, 0.5]) for _ in range(12)]
        args = SimpleNamespace(
            metric_for_best_model="loss", greater_is_better=greater, save_strategy="steps"
        )
        trainer = SimpleNamespace(args=args, state=TrainerState())
        callback, control = EarlyStoppingCallback(3), TrainerControl()
        best = Best(criterion=["eval_loss", greater, ""])
        for step, value in enumerate(values, 1):
            trainer.state.global_step = step
            best = best.after(step, value, f"checkpoint-{step}")
            was = trainer.state.best_metric
            Trainer._determine_best_metric(trainer, {"eval_loss": value}, None)
            now, trainer.state.best_metric = trainer.state.best_metric, was
            if was is not None or math.isfinite(value):  # the Trainer takes a nan that comes first
                callback.on_evaluate(args, trainer.state, control, {"eval_loss": value})
            trainer.state.best_metric = now if math.isfinite(now) else None
            assert best.step == (trainer.state.best_global_step or 0)
            if best.step:
                assert (best.value, best.folder) == (now, f"checkpoint-{best.step}")
                assert best.validations_without_gain == callback.early_stopping_patience_counter


def test_what_is_left_of_the_best_when_going_on(tmp_path: Path) -> None:
    train = TrainSettings(load_best_model_at_end=True, eval_strategy="steps")
    old, moved = tmp_path / "old", tmp_path / "moved"
    for step in (2, 4):
        (old / f"checkpoint-{step}").mkdir(parents=True)
        (old / f"checkpoint-{step}" / WEIGHTS).touch()
    best = Best(
        ["eval_loss", False, "d"],
        2,
        0.5,
        str(old / "checkpoint-2"),
        validations_without_gain=1,
        validation_pending=True,
    )
    assert best_before(train, vars(best), "d", old / "checkpoint-4") == (best, [])
    never = TrainSettings(load_best_model_at_end=False, eval_strategy="no")
    assert best_before(never, vars(best), "d", old / "checkpoint-4")[0].step == 0, (
        "none is looked for"
    )
    fresh = Best(["eval_loss", False, "other"], validation_pending=True)
    found, note = best_before(train, vars(best), "other", old / "checkpoint-4")
    assert found == fresh and "the metric or the validation data changed" in note[0]
    shutil.move(old, moved)
    found, _ = best_before(train, vars(best), "d", moved / "checkpoint-4")
    assert found.folder == str(moved / "checkpoint-2") and found.validations_without_gain == 1
    shutil.rmtree(moved / "checkpoint-2")
    found, note = best_before(train, vars(best), "d", moved / "checkpoint-4")
    assert found.step == 0 and "is not there any more" in note[0]


def problems(*words: str) -> list[str]:
    needed = ["--model_name_or_path=m", "--dataset=d", "--output_dir=o", *words]
    try:
        read_settings(needed, "train")
    except RequestError as error:
        return list(error.problems)
    return []


def test_the_requests_that_the_trainer_refuses_are_refused() -> None:
    judging, held = "--load_best_model_at_end=true", "--val_size=2"
    every = "--eval_strategy=steps"
    assert problems(judging, held, every) == [], "eval_steps is logging_steps, 10; save_steps 500"
    assert problems(judging, held, "--eval_strategy=epoch", "--save_strategy=epoch") == []
    assert len(problems(judging)) == 1 and "set eval_strategy" in problems(judging)[0]
    for strategy in ("no", "epoch"):
        (problem,) = problems(judging, held, every, f"--save_strategy={strategy}")
        assert "must be the same" in problem
    (problem,) = problems(judging, held, every, "--eval_steps=30", "--save_steps=100")
    assert "must be a multiple of eval_steps, which is 30" in problem
    (problem,) = problems("--early_stopping_steps=2")
    assert "early_stopping_steps (command line) counts validations" in problem
    both = problems(judging, "--early_stopping_steps=2", "--eval_dataset=d", held)
    assert len(both) == 4, "all at once"
    for key in ("val_size=0.1", "eval_dataset=d"):
        (problem,) = problems(f"--{key}")
        assert f"{key.split('=')[0]} (command line): nothing validates with these rows" in problem
    (problem,) = problems("--metric_for_best_model=rouge")
    assert "is not one of eval_loss, loss, eval_accuracy, accuracy" in problem


def test_less_loss_and_more_accuracy_are_better() -> None:
    assert TrainSettings().judged_by == ("eval_loss", False)
    assert TrainSettings(metric_for_best_model="loss").judged_by == ("eval_loss", False)
    assert TrainSettings(metric_for_best_model="accuracy").judged_by == ("eval_accuracy", True)
    assert TrainSettings(greater_is_better=True).judged_by == ("eval_loss", True)
