"""Dropout that recomputation can repeat, and the seeds of its masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The number of different tiles, pieces and layers that `dropout_seed` can tell apart.
TILES = 10_007
PIECES = 1_009
LAYERS = 1_000_003


@dataclass(frozen=True)
class MaskPlace:
    """The part of a step that some dropout masks belong to, in whichever block they are drawn.

    span_seed: differs between steps, ranks and spans. tile: its index in the span. piece: 0 for
    the attention of the whole tile; 1, 2, ... for the pieces in which its MLP is computed.
    """

    span_seed: int
    tile: int = 0
    piece: int = 0


def dropout_seed(place: MaskPlace, layer: int) -> int:
    """The seed of the masks that block `layer` draws at `place`: 0 to 2**63 - 1.

    A recomputed block must draw the masks of its first forward again, so the seed depends on
    nothing but its arguments. No two blocks and no two places in a span should share a seed.

    Hence the four numbers become the digits of one number, as hours, minutes and seconds become
    seconds: other digits, another number. Torch's generators take 64 bits, so what is used is the
    remainder modulo 2**63. The last three digits together are below 2**44 and thus all there.
    And two different seeds of spans stay different, because the three factors are odd: modulo a
    power of two, no two numbers times the same odd number are equal.

    A tile of more than 1,008 pieces would repeat masks of the next tile; that does no harm.
    """
    number = place.span_seed
    number = number * TILES + place.tile
    number = number * PIECES + place.piece
    number = number * LAYERS + layer
    return number % 2**63


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
        """Zero each element of x with the probability, and scale up the others for that."""
        share_left = 1.0 - self.probability
        mask = torch.empty_like(x).bernoulli_(share_left, generator=self.generator)
        return x * mask.div_(share_left)
