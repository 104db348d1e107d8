"""Dropout that recomputation can repeat."""

from __future__ import annotations

import torch
from torch import Tensor


class SeededDropout:
    """Dropout whose masks follow from a seed, so that a recomputed block draws them again."""

    def __init__(self, probability: float) -> None:
        self.probability = probability
        self.generator: torch.Generator | None = None

    def reseed(self, seed: int, device: torch.device) -> None:
        """Start the sequence of masks that belongs to `seed`, on the device of the inputs."""
        if self.generator is None:
            self.generator = torch.Generator(device)
        self.generator.manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        keep = 1.0 - self.probability
        mask = torch.empty_like(x).bernoulli_(keep, generator=self.generator)
        return x * mask.div_(keep)
