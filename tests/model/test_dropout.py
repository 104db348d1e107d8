"""Dropout: its share, and seeds that repeat for a recomputed block and for nothing else."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from minilora.model.dropout import MaskPlace, SeededDropout, dropout_seed
from minilora.model.tiles import document_tiles
from tests.support.models import LENGTHS, adapted_llama, batch, tiles_of


def test_dropout_drops_with_the_stated_probability_and_repeats_itself() -> None:
    dropout = SeededDropout(0.25)
    x = torch.ones(100, 400)
    dropout.reseed(7, x.device)
    first, second = dropout(x), dropout(x)
    dropout.reseed(7, x.device)
    assert torch.equal(dropout(x), first) and not torch.equal(first, second)
    assert first.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert abs(float((first == 0).float().mean()) - 0.25) < 0.01


def test_dropout_masks_differ_between_blocks_tiles_and_spans() -> None:
    seeds: list[int] = []
    model = adapted_llama(0, 0.3)
    for block in model.model.layers:
        block.dropout.reseed = lambda seed, device: seeds.append(seed)  # type: ignore[method-assign]
    token_ids, labels = batch()
    for span_seed in (0, 1):
        lengths = [LENGTHS[:2], LENGTHS[2:]]
        tiles = document_tiles(model.shape, lengths, span_seed, torch.empty(0), piece_tokens=3)
        with torch.no_grad():
            model(token_ids, labels, tiles, 1.0)
    # In every block of both spans: for the attention of 2 tiles, and for their 9 + 7 pieces of MLP.
    assert len(seeds) == len(set(seeds)) == 2 * (2 + 16) * len(model.model.layers)


def test_every_span_tile_piece_and_layer_has_a_seed_of_its_own() -> None:
    """Spans that differ in one bit, and of the rest the least and the most there can be."""
    spans = [0, *(1 << bit for bit in range(63))]
    tiles, pieces, layers = (0, 1, 10_006), (0, 1, 1_008), (0, 1, 1_000_002)
    seeds = [
        dropout_seed(MaskPlace(span, tile, piece), layer)
        for span, tile, piece, layer in product(spans, tiles, pieces, layers)
    ]
    assert len(set(seeds)) == len(seeds) == 64 * 27
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_stay_what_they_were() -> None:
    """Or a run that another version resumes would draw other masks than the one that it resumes."""
    assert dropout_seed(MaskPlace(0), 31) == 31
    assert dropout_seed(MaskPlace(0, tile=2, piece=3), 5) == 2_021_006_068
    assert dropout_seed(MaskPlace(2**63 - 5, tile=1), 0) == 9_223_321_552_397_322_890


def test_evaluation_drops_nothing() -> None:
    with_dropout, without = adapted_llama(0, 0.5).eval(), adapted_llama()
    token_ids, labels = batch()
    with torch.no_grad():
        losses = [m(token_ids, labels, tiles_of(m, LENGTHS), 1.0) for m in (with_dropout, without)]
    assert torch.equal(*losses)
