"""Weights to pack to 4 bits: a function of nothing, so that frozen bytes stay comparable."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.model.nf4 import LEVELS
from minilora.model.nf4_shape import BLOCK

GOLDEN = Path(__file__).with_name("nf4_golden.safetensors")  # written by make_nf4_golden.py
# The cases whose numbers are frozen too, beside their packed bytes.
WITH_NUMBERS = ("normal", "heavy tails", "zero and tiny", "near midpoints")
MIDPOINTS = tuple((lower + upper) / 2 for lower, upper in zip(LEVELS, LEVELS[1:], strict=False))


def cases() -> dict[str, Tensor]:
    """bf16 matrices by a name that says what is hard about them."""
    spread = _spread(2048)
    normal = torch.tensor([NormalDist(0, 0.02).inv_cdf(share) for share in spread])
    cauchy = torch.tensor([0.02 * math.tan(math.pi * (share - 0.5)) for share in spread])
    found = {
        "normal": normal.view(8, 256),
        "heavy tails": cauchy.view(8, 256),
        "zero and tiny": _zero_and_tiny(),
        "near midpoints": _near_midpoints(),
        "every exponent": _every_exponent(normal[:BLOCK] / normal[:BLOCK].abs().max()),
        "every number": every_number().view(255, 256),
    }
    return {name: weight.to(torch.bfloat16) for name, weight in found.items()}


def every_number() -> Tensor:
    """(65280,) bf16: every finite number, by sign and size."""
    bits = torch.arange(2**15, dtype=torch.int32)
    finite = bits[bits < 0x7F80].to(torch.int16).view(torch.bfloat16)
    return torch.cat([finite, -finite])


def every_quotient() -> Tensor:
    """(128, 1600) bf16: in each row one absmax of 1 to 2, with all numbers from its 1/32 up.

    These are all quotients of two bf16 numbers that matter: an exponent that both have changes
    nothing, and smaller quotients all get the level zero. Every block begins with the absmax.
    """
    numbers = every_number()
    numbers = numbers[(numbers.abs() >= 1 / 32) & (numbers.abs() < 2)]  # (1536,)
    numbers = F.pad(numbers, (0, -len(numbers) % (BLOCK - 1))).view(1, -1, BLOCK - 1)
    absmax = (1 + torch.arange(128) / 128).to(torch.bfloat16).view(-1, 1, 1)
    blocks = torch.where(numbers.abs() <= absmax, numbers, 0)
    return torch.cat([absmax.expand(-1, blocks.shape[1], -1), blocks], -1).flatten(1)


def _spread(count: int) -> list[float]:
    """Numbers spread evenly over 0 to 1, in an order like a random one (golden ratio)."""
    return [(index + 0.5) * 0.6180339887498949 % 1 for index in range(count)]


def _zero_and_tiny() -> Tensor:
    """Blocks of zeros of both signs, and with every absmax down to the smallest of bf16."""
    smallest = 2.0**-133
    shape = torch.linspace(-1, 1, BLOCK)
    tiny = [shape * smallest * 2.0**power for power in range(14)]
    return torch.stack([torch.zeros(BLOCK), -torch.zeros(BLOCK), *tiny])


def _near_midpoints() -> Tensor:
    """The four bf16 numbers around every midpoint of levels, for sixteen absmax."""
    rows = []
    for step in range(16):
        absmax = (1 + 8 * step / 128) * 2.0 ** (step - 12)
        exact = torch.tensor(MIDPOINTS, dtype=torch.float64) * absmax
        # Cut off to bf16, towards zero; one more in the bits is the next number away from zero.
        below = exact.float().view(torch.int32) >> 16
        around = torch.stack([below - 1, below, below + 1, below + 2]).flatten()
        numbers = (around << 16).view(torch.float32)
        rows.append(torch.cat([numbers, torch.tensor([absmax, -absmax, 0.0, -0.0])]))
    return torch.stack(rows)


def _every_exponent(block: Tensor) -> Tensor:
    """One block times every power of two of bf16, from numbers that vanish to the largest."""
    return torch.stack([block * 2.0**power for power in range(-134, 128)])
