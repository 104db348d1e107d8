"""A run that would learn nothing says so before it starts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from minilora.files.snapshot import State
from minilora.settings.errors import RequestError
from minilora.settings.settings import DataSettings, Settings, TrainSettings
from minilora.training.best_model import Best
from minilora.training.learning_rate import learning_rate
from minilora.training.remaining_steps import check_rates, nothing_left
from minilora.training.starting_point import StartingPoint


def settings(**train: Any) -> Settings:
    return Settings(train=TrainSettings(output_dir="out", **train))


@pytest.mark.parametrize(
    ("train", "key"),
    [({"warmup_steps": 5}, "warmup_steps"), ({"warmup_ratio": 0.1}, "warmup_ratio")],
)
def test_a_warm_up_of_the_only_step_is_refused(train: dict[str, Any], key: str) -> None:
    assert learning_rate(0, 1, TrainSettings(**train)) == 0
    with pytest.raises(RequestError, match=f"{key}: the learning rate would be 0 in every step"):
        check_rates(settings(**train), 0, 1)
    check_rates(settings(**train), 0, 2)
    check_rates(settings(**train, lr_scheduler_type="constant"), 0, 1)
    check_rates(settings(**train), 1, 1)  # nothing is left at all


def start(done: int, **best: Any) -> StartingPoint:
    found = Best(criterion=["eval_loss", False, "digest"], **best)
    state = State(done, 10 * done, {}, {}, {}, asdict(found))
    return StartingPoint(Path(f"out/checkpoint-{done}"), state, {}, [])


def test_what_is_left_after_a_snapshot() -> None:
    plain = settings()
    validating = DataSettings(dataset=("rows.json",), val_size=0.1)
    train = TrainSettings(output_dir="out", early_stopping_steps=2, eval_strategy="steps")
    patient = Settings(train=train, data=validating)
    assert nothing_left(start(11), plain, 12) is None
    for total in (12, 5):
        line = nothing_left(start(12), plain, total)
        assert line is not None and f"after step 12, and the run has {total}; raise" in line
    assert nothing_left(start(12, validation_pending=True), plain, 12) is None
    line = nothing_left(start(6, step=2, validations_without_gain=2), patient, 12)
    assert line is not None and "no validation since step 2 was better" in line
    assert nothing_left(start(6, step=2, validations_without_gain=1), patient, 12) is None
