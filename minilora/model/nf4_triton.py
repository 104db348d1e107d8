"""`nf4.unpack` on a GPU as one kernel: 2.5 bytes of memory traffic for each weight in bf16.

Plain torch moves 12.5 bytes. Triton comes with torch for CUDA; only `nf4` imports this file, and
only for a tensor on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.model.nf4_shape import BLOCK

BLOCKS_PER_PROGRAM = 32


def unpack_fused(packed: Tensor, levels: Tensor, weight: Tensor) -> None:
    """packed: (out, in * 17 / 32) uint8; levels: (16,) fp32; weight: (out, in), is written to.

    All three are contiguous.
    """
    assert weight.numel() < 2**31, "the kernel counts in int32"
    blocks = weight.numel() // BLOCK
    grid = (triton.cdiv(blocks, BLOCKS_PER_PROGRAM),)
    # Triton starts a kernel on the current GPU, not on the tensor's.
    with torch.cuda.device_of(packed):  # type: ignore[no-untyped-call]
        _unpack_blocks[grid](
            packed, levels, weight, blocks, weight.shape[1] // BLOCK, BLOCKS_PER_PROGRAM
        )


@triton.jit  # type: ignore[untyped-decorator]
def _unpack_blocks(packed, levels, weight, blocks, row_blocks, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program unpacks COUNT blocks of 64 weights: tiles of (COUNT, 32) bytes.

    A row of the packed matrix holds 32 bytes of codes for each of its blocks, and behind them all
    two bytes of absmax for each.
    """
    block = tl.program_id(0) * COUNT + tl.arange(0, COUNT)[:, None]
    inside = block < blocks
    row = packed + block // row_blocks * (34 * row_blocks)
    in_row = block % row_blocks

    # bf16 is the upper half of fp32. Byte by byte, for the address of the first may be odd.
    scale = row + 32 * row_blocks + 2 * in_row
    low = tl.load(scale, mask=inside, other=0).to(tl.int32)
    high = tl.load(scale + 1, mask=inside, other=0).to(tl.int32)
    absmax = (high << 24 | low << 16).to(tl.float32, bitcast=True)

    code = tl.load(row + 32 * in_row + tl.arange(0, 32)[None, :], mask=inside, other=0)
    first = tl.load(levels + (code >> 4)) * absmax
    second = tl.load(levels + (code & 15)) * absmax
    numbers = tl.interleave(first, second).to(weight.dtype.element_ty)
    tl.store(weight + block * 64 + tl.arange(0, 64)[None, :], numbers, mask=inside)
