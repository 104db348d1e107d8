"""The fused unpacking in Triton's interpreter, which runs a kernel on the CPU.

TRITON_INTERPRET=1 python -m tests.support.nf4_in_triton      # a process of its own: Triton reads
                                                              # the variable when it is imported
"""

from __future__ import annotations

import warnings

import torch

from minilora.model import nf4
from minilora.model.nf4_triton import unpack_fused
from tests.support.nf4_cases import cases

CPU = torch.device("cpu")


def compare_all() -> int:
    """Returns how many matrices were unpacked to the numbers of plain torch."""
    weights = [*cases().values(), torch.randn(37, 5 * nf4.BLOCK)]
    compared = 0
    for weight in weights:
        packed = nf4.pack(weight)
        moved = torch.cat([packed.new_zeros(1), packed.flatten()])[1:].view(packed.shape)
        for dtype in (torch.float32, torch.float16):
            expected = nf4.unpack(packed, dtype)
            for where in (packed, moved):  # at an even and at an odd address
                found = torch.full_like(expected, 7)
                unpack_fused(where, nf4._levels(CPU), found)
                assert torch.equal(found, expected), (weight.shape, dtype)
                assert torch.equal(found.signbit(), expected.signbit())
                compared += 1
    return compared


def try_it() -> None:
    """The trial of the kernel: the interpreter cuts bf16 off where it should round."""
    assert nf4._fused(CPU, torch.float32) is unpack_fused
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert nf4._fused(CPU, torch.bfloat16) is None
    assert "differ" in str(told[-1].message)


if __name__ == "__main__":
    try_it()
    print(f"compared: {compare_all()}")
