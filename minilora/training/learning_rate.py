"""Learning rate per optimizer step: the schedules of transformers' optimization.py."""

from __future__ import annotations

import math

from minilora.settings.keys import steps_of
from minilora.settings.settings import TrainSettings


def learning_rate(step: int, total_steps: int, train: TrainSettings) -> float:
    """The rate of optimizer step `step` (counted from 0) of `total_steps`."""
    warmup = warmup_steps(total_steps, train)
    if train.lr_scheduler_type != "constant" and step < warmup:
        return train.learning_rate * step / warmup
    return train.learning_rate * _decay(step, warmup, total_steps, train)


def warmup_steps(total_steps: int, train: TrainSettings) -> int:
    """Steps in which the rate rises: warmup_steps, or warmup_ratio of the run where that is 0."""
    if not train.warmup_steps:
        return math.ceil(total_steps * train.warmup_ratio)
    return steps_of(train.warmup_steps, total_steps)


def _decay(step: int, warmup: int, total: int, train: TrainSettings) -> float:
    """The factor by which the highest rate is multiplied after the warm-up.

    The constants are the defaults of transformers: one cycle of the cosine, a polynomial of power
    1 down to a rate of 1e-7, and for inverse_sqrt without warm-up a time scale of 10,000 steps.
    """
    progress = (step - warmup) / max(1, total - warmup)
    match train.lr_scheduler_type:
        case "constant" | "constant_with_warmup":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine" | "cosine_with_restarts":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "polynomial":
            end = 1e-7 / train.learning_rate
            return max(end, (1.0 - end) * (1.0 - progress) + end)
        case "inverse_sqrt":
            scale = warmup or 10000
            return 1.0 / math.sqrt((step + scale - warmup) / scale)
        case kind:
            raise AssertionError(f"lr_scheduler_type {kind} passed the check of the settings")
