"""Tiles: the runs of whole documents that a block computes at one time, and pieces of them.

A block's attention is computed tile by tile. Its MLP, which is wider, is computed piece by piece:
most tiles are one piece, but a document that is longer than a tile should be makes a long tile,
and then the MLP goes through it in several pieces.
"""

# Shape letters: N tokens, H heads, K kv heads, E head dim.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from minilora.model.attention import causal_attention
from minilora.model.dropout import MaskPlace
from minilora.model.llama_shape import LlamaShape
from minilora.model.rope import rotation


class Attend(Protocol):
    """How queries meet keys: within the documents of a tile, or against a cache."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


class Tile(Protocol):
    """What a block must know of the tokens that it computes at one time.

    `DocumentTile` is the one of training, `decode.CachedTile` the one of answering.
    """

    @property
    def rows(self) -> slice: ...

    @property
    def pieces(self) -> Sequence[slice]: ...

    @property
    def rotation(self) -> tuple[Tensor, Tensor]: ...

    @property
    def masks(self) -> MaskPlace: ...

    @property
    def graph_only(self) -> bool: ...

    @property
    def attend(self) -> Attend: ...


@dataclass(frozen=True)
class DocumentTile:
    """Whole documents at `rows` of the flat run of tokens; each attends within itself.

    pieces: rows within the tile, in order. rotation: cos and sin of rope, (N, 1, E) each.
    lengths: tokens of each document. boundaries: their running sum from 0, (documents + 1,) int32.
    masks: where dropout is in the step. graph_only: see `recompute.Rows`.
    """

    rows: slice
    pieces: tuple[slice, ...]
    rotation: tuple[Tensor, Tensor]
    lengths: tuple[int, ...]
    boundaries: Tensor
    masks: MaskPlace
    graph_only: bool = False

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: (N, H, E); key, value: (N, K, E). Returns (N, H, E)."""
        return causal_attention(query, key, value, self.lengths, self.boundaries)


@dataclass(frozen=True)
class MlpPiece:
    """Rows of a tile that the MLP computes at one time; the fields are those of a tile."""

    rows: slice
    masks: MaskPlace
    graph_only: bool = False


def document_tiles(
    shape: LlamaShape,
    lengths: Sequence[Sequence[int]],
    seed: int,
    like: Tensor,
    piece_tokens: int | None = None,
) -> list[DocumentTile]:
    """Lay tiles of documents one after another, on the device and in the dtype of `like`.

    lengths: for each tile the lengths of its documents, in tokens. seed: of the span's dropout.
    piece_tokens: the most rows that the MLP computes at one time, None for whole tiles.
    Rotation tables are computed in fp32 and stored in the dtype of `like`.
    """
    tiles: list[DocumentTile] = []
    start = 0
    for index, documents in enumerate(lengths):
        total = sum(documents)
        piece = piece_tokens or total

        # Positions restart at every document. They are made on the host, because there may be
        # hundreds of short documents, and each would start a tiny kernel on the GPU. The copies
        # are non_blocking, because a blocking one waits until the GPU has finished all its work.
        positions = torch.cat([torch.arange(length) for length in documents])  # (N,)
        positions = positions.to(like.device, non_blocking=True)
        boundaries = torch.tensor([0, *documents]).cumsum(0, dtype=torch.int32)
        boundaries = boundaries.to(like.device, non_blocking=True)  # (documents + 1,)

        tile = DocumentTile(
            rows=slice(start, start + total),
            pieces=tuple(slice(at, at + piece) for at in range(0, total, piece)),
            rotation=rotation(shape.rope, shape.head_dim, positions, like.dtype),
            lengths=tuple(documents),
            boundaries=boundaries,
            masks=MaskPlace(seed, tile=index),
        )
        tiles.append(tile)
        start += total
    return tiles
