"""Learning rate per step: the schedules of transformers' optimization.py, in closed form."""

from __future__ import annotations

import math

from minilora.settings.settings import TrainSettings


def learning_rate(step: int, total_steps: int, train: TrainSettings) -> float:
    """The rate of optimizer step `step` (from 0) of `total_steps`."""
    warmup = warmup_steps(total_steps, train)
    if train.lr_scheduler_type != "constant" and step < warmup:
        return train.learning_rate * step / warmup
    return train.learning_rate * _factor(train.lr_scheduler_type, step, warmup, total_steps, train)


def warmup_steps(total_steps: int, train: TrainSettings) -> int:
    """warmup_steps, or warmup_ratio of the run where that is 0."""
    return train.warmup_steps or math.ceil(total_steps * train.warmup_ratio)


def _factor(kind: str, step: int, warmup: int, total: int, train: TrainSettings) -> float:
    rest = max(1, total - warmup)
    progress = (step - warmup) / rest
    match kind:
        case "constant" | "constant_with_warmup":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine" | "cosine_with_restarts":  # one cycle, the default of transformers
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "polynomial":  # power 1, down to 1e-7, both the defaults of transformers
            end = 1e-7 / train.learning_rate
            return max(end, (1.0 - end) * (1.0 - progress) + end)
        case "inverse_sqrt":
            shift = (warmup or 10000) - warmup  # transformers' timescale without warm-up
            return 1.0 / math.sqrt((step + shift) / (warmup or 10000))
        case _:
            raise AssertionError(f"lr_scheduler_type {kind} passed the check of the settings")
