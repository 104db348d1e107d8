"""Tiles and pieces: where their rows lie, and that any of them give the same gradients."""

from __future__ import annotations

import pytest
import torch

from minilora.model.dropout import MaskPlace
from minilora.model.rope import rotation
from minilora.model.tiles import document_tiles
from tests.support.models import LENGTHS, adapted_llama, batch, gradients


def test_tiles_lie_one_after_another_and_positions_restart_at_every_document() -> None:
    shape = adapted_llama().shape
    like = torch.empty(0, dtype=torch.bfloat16)
    first, second = document_tiles(shape, [(2, 3), (7,)], 9, like, piece_tokens=5)
    assert (first.rows, second.rows) == (slice(0, 5), slice(5, 12))
    assert (first.pieces, second.pieces) == ((slice(0, 5),), (slice(0, 5), slice(5, 10)))
    assert (first.lengths, second.lengths) == ((2, 3), (7,))
    assert first.boundaries.tolist() == [0, 2, 5] and second.boundaries.tolist() == [0, 7]
    assert first.boundaries.dtype == torch.int32
    assert (first.masks, second.masks) == (MaskPlace(9, 0), MaskPlace(9, 1))
    positions = torch.tensor([0, 1, 0, 1, 2])
    expected = rotation(shape.rope, shape.head_dim, positions, torch.bfloat16)
    for found, table in zip(first.rotation, expected, strict=True):
        assert found.dtype == torch.bfloat16 and torch.equal(found, table)


def test_any_tiling_gives_the_same_gradients() -> None:
    one = gradients(adapted_llama(), [LENGTHS])
    for tiles in ([(length,) for length in LENGTHS], [LENGTHS[:2], LENGTHS[2:]]):
        other = gradients(adapted_llama(), tiles)
        for name, grad in one.items():
            scale = float(grad.abs().max())
            torch.testing.assert_close(other[name], grad, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_long_document_in_pieces_gives_the_same_gradients(dropout: float) -> None:
    """A tile whose MLP goes through pieces of 8 rows, whether activations are saved or not."""
    document = [(sum(LENGTHS),)]
    # With dropout the masks depend on the pieces, so there the first one is in pieces too.
    whole = gradients(adapted_llama(0, dropout), document, 8 if dropout else None)
    for keep in (0, 1, 2):
        for name, grad in gradients(adapted_llama(keep, dropout), document, 8).items():
            scale = float(whole[name].abs().max())
            torch.testing.assert_close(grad, whole[name], rtol=1e-6, atol=1e-6 * scale)


def test_a_long_document_in_pieces_never_has_the_whole_mlp_in_memory() -> None:
    """The widest tensor of the MLP has a piece's rows, in forward and in backward."""
    model = adapted_llama()
    rows: list[int] = []  # of each output of the wide layers
    for block in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            layer = getattr(block.mlp, name)
            layer.register_forward_hook(lambda *args: rows.append(args[2].shape[0]))
    token_ids, labels = batch()
    tiles = document_tiles(model.shape, [(len(token_ids),)], 0, torch.empty(0), 8)
    model(token_ids, labels, tiles, 1.0).backward()
    assert max(rows) == 8 < len(token_ids)
