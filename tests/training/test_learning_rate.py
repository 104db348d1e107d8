"""Learning rates against transformers' schedulers, step for step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainerState, TrainingArguments, get_scheduler
from transformers.trainer_callback import DefaultFlowCallback, TrainerControl

from minilora.settings.keys import steps_of
from minilora.settings.settings import TrainSettings
from minilora.training.learning_rate import learning_rate, warmup_steps

KINDS = (
    "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial",
    "inverse_sqrt",
)  # fmt: skip


@pytest.mark.parametrize("warmup", [0, 1, 7, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_every_schedule_equals_transformers(kind: str, warmup: int) -> None:
    train = TrainSettings(lr_scheduler_type=kind, warmup_steps=warmup, learning_rate=3e-4)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    expected, mine = [], []
    for step in range(20):
        if step:
            optimizer.step()
            theirs.step()
        expected.append(optimizer.param_groups[0]["lr"])
        mine.append(learning_rate(step, 20, train))
    assert mine == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert len(set(mine)) > 1 or kind.startswith("constant")


def test_warmup_ratio_counts_steps_as_the_trainer_does() -> None:
    assert warmup_steps(101, TrainSettings(warmup_ratio=0.1)) == 11  # rounded up
    assert warmup_steps(101, TrainSettings(warmup_ratio=0.1, warmup_steps=3)) == 3


TOTALS = (1, 2, 3, 7, 10, 99, 100, 101, 1000)
SHARES = (1e-6, 0.01, 0.1, 0.25, 1 / 3, 0.5, 0.999, 1, 2, 10)


@pytest.mark.parametrize("warmup", [0, *SHARES])
def test_warmup_steps_below_1_are_the_trainers_share(warmup: float, tmp_path: Path) -> None:
    train = TrainSettings(warmup_steps=warmup, learning_rate=3e-4)
    theirs = TrainingArguments(output_dir=str(tmp_path), warmup_steps=warmup, report_to=[])
    for total in TOTALS:
        expected = theirs.get_warmup_steps(total)
        assert warmup_steps(total, train) == expected
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
        scheduler = get_scheduler("linear", optimizer, expected, total)
        for step in range(min(total, 20)):
            rate = optimizer.param_groups[0]["lr"]
            assert learning_rate(step, total, train) == pytest.approx(rate, rel=1e-12, abs=1e-18)
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("every", SHARES)
def test_log_save_and_eval_steps_below_1_are_the_trainers_share(
    every: float, tmp_path: Path
) -> None:
    """The steps at which the Trainer's own callback logs, saves and evaluates."""
    theirs = TrainingArguments(
        output_dir=str(tmp_path), logging_steps=every, save_steps=every, eval_steps=every,
        eval_strategy="steps", report_to=[], logging_first_step=False,
    )  # fmt: skip
    for total in TOTALS:
        state = TrainerState(max_steps=total)
        state.compute_steps(theirs, total)
        for step in range(1, total + 1):
            state.global_step = step
            control = DefaultFlowCallback().on_step_end(theirs, state, TrainerControl())
            due = step % steps_of(every, total) == 0
            assert control.should_log is control.should_evaluate is due or step == total
            assert control.should_save is due or step == total
