"""Tiles: the runs of whole documents that a block computes at one time."""

# Shape letters: N tokens, H heads, K kv heads, E head dim.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from minilora.model.attention import causal_attention
from minilora.model.llama_shape import LlamaShape
from minilora.model.rope import rotation


class Attend(Protocol):
    """How queries meet keys: within the documents of a tile, or against a cache."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


class Tile(Protocol):
    """A run of tokens that a block computes at one time; its MLP walks the pieces of it."""

    @property
    def rows(self) -> slice: ...

    @property
    def pieces(self) -> Sequence[slice]: ...

    @property
    def rotation(self) -> tuple[Tensor, Tensor]: ...

    @property
    def seed(self) -> int: ...

    @property
    def attend(self) -> Attend: ...


@dataclass(frozen=True)
class DocumentTile:
    """Whole documents at `rows` of the flat run; each attends within itself.

    pieces: rows within the tile, more than one where a document is longer than a tile should be;
    rotation: cos and sin, (N, 1, E); lengths: tokens of each document; boundaries: their running
    sum, (documents + 1,) int32; seed: of the dropout masks.
    """

    rows: slice
    pieces: tuple[slice, ...]
    rotation: tuple[Tensor, Tensor]
    lengths: tuple[int, ...]
    boundaries: Tensor
    seed: int

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return causal_attention(query, key, value, self.lengths, self.boundaries)


@dataclass(frozen=True)
class MlpPiece:
    """Rows of a tile that the MLP computes at one time."""

    rows: slice
    seed: int


def document_tiles(
    shape: LlamaShape,
    lengths: Sequence[Sequence[int]],
    seed: int,
    like: Tensor,
    piece_tokens: int | None = None,
) -> list[DocumentTile]:
    """Lay tiles of documents one after another, on the device and in the dtype of `like`.

    lengths: of each document of each tile, in tokens; seed: of the dropout of the whole run;
    piece_tokens: most rows that the MLP computes at one time, None for whole tiles.
    Rotation tables are computed in fp32 and kept in that dtype.
    """
    tiles, start = [], 0
    for index, tile in enumerate(lengths):
        total = sum(tile)
        piece = piece_tokens or total
        # On the host first: hundreds of short documents would be hundreds of tiny kernels. And
        # non_blocking: otherwise each copy waits until the GPU has done all it was asked before.
        positions = torch.cat([torch.arange(length) for length in tile])
        positions = positions.to(like.device, non_blocking=True)
        boundaries = torch.tensor([0, *tile]).cumsum(0, dtype=torch.int32)
        boundaries = boundaries.to(like.device, non_blocking=True)
        tiles.append(
            DocumentTile(
                rows=slice(start, start + total),
                pieces=tuple(slice(at, at + piece) for at in range(0, total, piece)),
                rotation=rotation(shape.rope, shape.head_dim, positions, like.dtype),
                lengths=tuple(tile),
                boundaries=boundaries,
                seed=(seed * 10007 + index) * 1009,  # room for the seeds of its pieces
            )
        )
        start += total
    return tiles
