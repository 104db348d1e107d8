"""Which elements of a tensor in the files a rank reads, for the part of it that the rank keeps.

Where weights are held in 4 bits, a partition is a range of packed bytes, and a row is packed as a
whole. So a rank reads the rows that its range touches, packs them, and cuts off the ends. A row in
which one rank's range ends and the next one's begins is read by both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minilora.model.nf4_shape import PIECE, packed_columns


@dataclass(frozen=True)
class TensorPart:
    """A range of the elements of one tensor, flattened, and the memory that it is read into.

    The range is `start` to `start + len(destination)`. destination: one-dimensional, any dtype; if
    it is uint8, the range counts the bytes of the tensor packed by nf4.py.
    """

    name: str
    start: int
    destination: Tensor

    @property
    def packed(self) -> bool:
        """Whether the numbers are packed before they go into the destination."""
        return self.destination.dtype == torch.uint8


class Reading(NamedTuple):
    """What is read at one time: some elements of a tensor of the files, from `start` on.

    destination: the numbers go there; where they are packed, the packed bytes from `skipped` on.
    """

    start: int
    elements: int
    destination: Tensor
    skipped: int = 0


def readings(part: TensorPart, columns: int) -> Iterator[Reading]:
    """What has to be read for a part, in order: all of it at once, or some whole rows at a time.

    columns: of the tensor in the files.
    """
    length = len(part.destination)
    if not part.packed:
        yield Reading(part.start, length, part.destination)
        return

    row_bytes = packed_columns(columns)
    rows_at_a_time = max(PIECE // columns, 1)
    end = part.start + length
    first = part.start // row_bytes
    last = -(-end // row_bytes)  # the row after the last one that the part touches
    for row in range(first, last, rows_at_a_time):
        next_row = min(row + rows_at_a_time, last)
        inside = slice(max(row * row_bytes, part.start), min(next_row * row_bytes, end))
        yield Reading(
            start=row * columns,
            elements=(next_row - row) * columns,
            destination=part.destination[inside.start - part.start : inside.stop - part.start],
            skipped=inside.start - row * row_bytes,
        )
