"""4-bit NormalFloat: weights packed to 4.25 bits each, and unpacked again (QLoRA's NF4).

Each block of 64 weights of a row is divided by its largest magnitude, the absmax. Each quotient
becomes the number of the nearest of sixteen levels. The levels are quantiles of the normal
distribution, because the weights of a trained matrix are nearly normal. Unpacking multiplies a
level with the absmax. The paper is Dettmers et al. 2023, arXiv 2305.14314; all bytes and numbers
are those of its own code, bitsandbytes.

A packed matrix is one uint8 tensor (out, in * 17 / 32). A row has in / 2 bytes with two numbers of
levels each, the first in the upper four bits; then a bf16 absmax for each block. Rows do not depend
on each other, so a rank can pack just those rows of a file that its part of the bytes touches.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from minilora.model.nf4_shape import BLOCK, PIECE, packed_columns, unpacked_columns

# Appendix E of the paper, in fp32: seven quantiles below zero, zero, and eight above it, divided by
# the largest.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# A smaller absmax is not divided by, as in bitsandbytes: 0 / 0 would be nan.
SMALLEST_DIVISOR = 1e-38


def pack(weight: Tensor) -> Tensor:
    """Pack a matrix on the device where it lies.

    weight: (out, in), in a multiple of 64. fp32 and fp16 are rounded to bf16 first, so that every
    absmax is a bf16 number. Returns (out, in * 17 / 32) uint8. Where a block has an inf or a nan,
    some of its numbers are inf or nan when they are unpacked.
    """
    rows, columns = weight.shape
    packed = weight.new_empty((rows, packed_columns(columns)), dtype=torch.uint8)
    for piece, target in _pieces(weight, packed, PIECE // columns):
        _pack_piece(piece, target)
    return packed


def _pieces(source: Tensor, target: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same `rows` rows of both at a time, or one row where that is more than a piece."""
    yield from zip(
        torch.split(source, max(rows, 1)), torch.split(target, max(rows, 1)), strict=True
    )


def _pack_piece(weight: Tensor, packed: Tensor) -> None:
    """weight: (out, in); packed: (out, in * 17 / 32) uint8, is written to."""
    rows, columns = weight.shape
    blocks = weight.to(torch.bfloat16).float().view(rows, -1, BLOCK)
    absmax = blocks.abs().amax(-1, keepdim=True)
    blocks /= absmax.clamp(min=SMALLEST_DIVISOR)

    # The nearest level has as many midpoints between levels below the quotient as levels below
    # itself. Rounding changes no number: a quotient of two bf16 numbers is never as near to a
    # midpoint as ten rounding errors of fp32.
    numbers = torch.zeros_like(blocks, dtype=torch.uint8)
    for lower, upper in zip(LEVELS, LEVELS[1:], strict=False):
        numbers += blocks > (lower + upper) / 2

    first, second = numbers.view(rows, -1, 2).unbind(-1)
    packed[:, : columns // 2] = first << 4 | second
    packed[:, columns // 2 :] = absmax.flatten(1).to(torch.bfloat16).view(torch.uint8)


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights of a packed matrix: level * absmax in fp32, then rounded once to dtype.

    packed: (out, in * 17 / 32) uint8, contiguous. Returns (out, in) of dtype. On a GPU one Triton
    kernel does it where Triton works.
    """
    assert packed.is_contiguous()
    weight = packed.new_empty((len(packed), unpacked_columns(packed.shape[1])), dtype=dtype)
    levels = _levels(packed.device)
    fused = _fused(packed.device, dtype) if packed.is_cuda else None
    if fused:
        fused(packed, levels, weight)
    else:
        _unpack_plain(packed, levels, weight)
    return weight


def _levels(device: torch.device) -> Tensor:
    """LEVELS as (16,) fp32. torch.tensor would return bf16 inside DeepSpeed's zero.Init."""
    levels = torch.frombuffer(array("f", LEVELS), dtype=torch.float32)
    return levels.to(device, non_blocking=True)


def _unpack_plain(packed: Tensor, levels: Tensor, weight: Tensor) -> None:
    """packed: (out, in * 17 / 32) uint8; levels: (16,) fp32; weight: (out, in), is written to."""
    # The two levels of every byte: one look-up gives two weights. As one number of 64 bits each,
    # (256,), because a CPU looks single numbers up three times as fast as rows of two.
    both = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], -1)
    pairs = both.view(torch.int64).flatten()
    for piece, target in _pieces(packed, weight, PIECE // weight.shape[1]):
        _unpack_piece(piece, pairs, target)


def _unpack_piece(packed: Tensor, pairs: Tensor, weight: Tensor) -> None:
    """packed: (out, in * 17 / 32) uint8; pairs: (256,) of two fp32 each, as int64; weight: (out,
    in), is written to.
    """
    rows, columns = weight.shape
    numbers, scales = torch.split(packed, [columns // 2, columns // 32], -1)
    # A copy: bytes can be viewed as bf16 only where the first has an even address.
    absmax = scales.clone().view(torch.bfloat16).float().unsqueeze(-1)
    levels = torch.index_select(pairs, 0, numbers.int().flatten()).view(torch.float32)
    products = levels.view(rows, -1, BLOCK).mul_(absmax)
    weight.view(rows, -1, BLOCK).copy_(products)


@cache
def _fused(
    device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor, Tensor, Tensor], None] | None:
    """The Triton kernel in place of _unpack_plain, or None where it does not work.

    It is tried once. Triton needs a C compiler, which not every machine has; and a kernel whose
    numbers differ from plain torch's is not used.
    """
    packed = pack(torch.linspace(-1, 1, 6 * BLOCK, device=device).view(2, -1))
    levels = _levels(device)
    expected, found = (packed.new_empty((2, 3 * BLOCK), dtype=dtype) for _ in range(2))
    _unpack_plain(packed, levels, expected)
    try:
        from minilora.model.nf4_triton import unpack_fused

        unpack_fused(packed, levels, found)
        if not torch.equal(found, expected):
            raise ArithmeticError("the kernel's numbers differ from plain torch's")
    except Exception as error:  # a missing package or compiler, and all that Triton raises
        warnings.warn(f"4-bit weights are unpacked without Triton, slowly: {error!r}", stacklevel=2)
        return None
    return unpack_fused
