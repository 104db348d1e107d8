"""Rotary positions (Su et al. 2021, arXiv 2104.09864), and their scaling for long documents.

Each head's E numbers are E / 2 pairs, and each pair is a point in a plane. The point is turned by
an angle that grows with the position, fast for the first pairs and slowly for the last. So the
product of a query and a key depends on their distance. In the files of Hugging Face the partner
of number i is number i + E / 2 ("half-split").
"""

# Shape letters: N tokens, E head dim.

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.model.llama_shape import Rope


def rotation(
    rope: Rope, head_dim: int, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, (N, 1, E) in dtype, for positions (N,)."""
    frequencies = rope_frequencies(rope, head_dim).to(positions.device, non_blocking=True)
    angles = positions[:, None].float() * frequencies  # (N, E / 2)
    angles = torch.cat((angles, angles), -1).unsqueeze(1)  # (N, 1, E), the same for both halves
    scale = rope.attention_factor
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rope_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Angle per position of each pair of numbers, (E / 2,) fp32.

    Scaled are those of kind llama3 as by `apply_scaling` of llama-models, of kind yarn as by Peng
    et al. 2023, arXiv 2309.00071, section 3.2; the constants are from config.json.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "default":
        return frequencies
    if rope.kind == "linear":
        return frequencies / rope.factor

    # Pairs that turn high_freq_factor times or more within the original context tell tokens nearby
    # apart; they stay as they are (blend 1). Those that turn low_freq_factor times or less, which
    # is once, would come to angles that pretraining never had beyond that context; they are slowed
    # down by the factor (blend 0). Between the two it is a mixture.
    if rope.kind == "yarn":
        blend = _yarn_blend(rope, head_dim)
    else:
        wavelengths = 2 * math.pi / frequencies  # in positions
        turns = rope.original_max_position / wavelengths
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def _yarn_blend(rope: Rope, head_dim: int) -> Tensor:
    """How much of its own frequency each pair keeps, (E / 2,): a line over the pairs' numbers.

    It falls from 1 at the pair that turns `beta_fast` times to 0 at the one that turns `beta_slow`
    times. Both are whole numbers within a head, as in the authors' code and in transformers.
    """

    def pair_that_turns(times: float) -> float:
        # Pair i turns original / (2 pi theta^(2 i / E)) times within the original context.
        ratio = rope.original_max_position / (times * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    first = max(math.floor(pair_that_turns(rope.high_freq_factor)), 0)
    last = min(math.ceil(pair_that_turns(rope.low_freq_factor)), head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    return 1 - (pairs - first) / max(last - first, 0.001)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each head of x (N, heads, E) by its position's angles, the cos and sin of `rotation`."""
    rotated: Tensor = _Rotate.apply(x, *rotation)  # type: ignore[no-untyped-call]
    return rotated


class _Rotate(torch.autograd.Function):
    """The gradient of a turn is the turn back. Autograd would go back through each step of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """x * cos + (-second half, first half) * sin, by the angles (sign 1) or back (sign -1)."""
    half = x.shape[-1] // 2
    turned = x * cos
    # In place, half by half: the tensor (-second half, first half) is never made.
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return turned
