"""The frozen weight of a linear layer, packed to 4 bits or not, as products ask for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from minilora.model.nf4 import unpack


class Matrix:
    """A frozen weight: the parameter, and its numbers where the parameter holds packed bytes.

    parameter: (out, in), or packed by nf4.py: (out, in * 17 / 32) uint8. Whoever needs the numbers
    asks for them each time, in backward too, so that no graph ever holds an unpacked weight.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self._is_kept = False
        self._unpacked: Tensor | None = None

    def __len__(self) -> int:
        """How many outputs the layer has, packed or not."""
        return len(self.parameter)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """(out, in): unpacked to dtype, or the parameter itself where it is not packed."""
        if self.parameter.dtype != torch.uint8:
            return self.parameter
        if self._unpacked is not None:
            return self._unpacked

        numbers = unpack(self.parameter, dtype)
        if self._is_kept:
            self._unpacked = numbers
        return numbers


@contextmanager
def unpacked_once(matrices: Sequence[Matrix]) -> Iterator[None]:
    """Inside, what is asked of these matrices is unpacked once and kept; outside, at each request.

    A block is entered like this once in forward and once in backward, around all of its tiles. Its
    unpacked weights then take as much memory as ZeRO-3 takes to gather a block that is not packed.
    """
    for matrix in matrices:
        matrix._is_kept = True
    try:
        yield
    finally:
        for matrix in matrices:
            matrix._is_kept = False
            matrix._unpacked = None
