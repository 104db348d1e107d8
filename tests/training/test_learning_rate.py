"""Learning rates against transformers' schedulers, step for step."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

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
