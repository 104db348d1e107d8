"""How many bytes a weight takes when it is packed to 4 bits (NF4). Without torch."""

from __future__ import annotations

from collections.abc import Mapping

from minilora.settings.errors import RequestError, shortened

# Weights of a row that share one scale (Dettmers et al. 2023, arXiv 2305.14314, section 3).
BLOCK = 64

# How many weights are packed or unpacked at a time. That takes 32 MiB of scratch memory.
PIECE = 2**22


def packed_columns(columns: int) -> int:
    """Bytes of a packed row of `columns` weights: half a byte each, two for the scale of a block.

    This is columns * 17 / 32, so 4.25 bits for each weight.
    """
    assert columns % BLOCK == 0, columns
    return columns // 2 + columns // BLOCK * 2


def unpacked_columns(row_bytes: int) -> int:
    """Weights of a packed row of `row_bytes` bytes."""
    assert row_bytes % packed_columns(BLOCK) == 0, row_bytes
    return row_bytes // packed_columns(BLOCK) * BLOCK


def packed_shapes(shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The shapes of packed matrices by their names: (out, in) becomes (out, bytes of a row).

    Raises RequestError naming the matrices whose rows cannot be cut into blocks of 64 weights.
    """
    problems = [
        f"{name} has rows of {columns} weights: quantization_bit: 4 needs a multiple of {BLOCK}; "
        "without quantization_bit the weights stay in bf16"
        for name, (_, columns) in shapes.items()
        if columns % BLOCK
    ]
    if problems:
        raise RequestError(shortened(problems))
    return {name: (rows, packed_columns(columns)) for name, (rows, columns) in shapes.items()}
