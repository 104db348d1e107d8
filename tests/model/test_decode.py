"""The cache held against whole documents, the draws against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.generation import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minilora.files.model_config import read_model_config
from minilora.files.weights import read_checkpoint
from minilora.generate import load
from minilora.model.decode import CachedTile, Sampling, candidates, choose, generate
from minilora.model.llama import Llama
from minilora.model.tiles import document_tiles


@pytest.fixture(params=["plain", "tied"])
def model(request: pytest.FixtureRequest, tiny: Path, tiny_tied: Path) -> Llama:
    return load(
        read_checkpoint(read_model_config(tiny if request.param == "plain" else tiny_tied)), None
    )


def test_logits_with_the_cache_equal_those_without(model: Llama) -> None:
    documents = [torch.randint(0, 512, (length,)).tolist() for length in (17, 1, 6, 40)]
    with torch.inference_mode():
        tiles = document_tiles(model.shape, [[len(d) for d in documents]], 0, torch.empty(0))
        whole = model.logits(torch.tensor(sum(documents, [])), tiles).split([17, 1, 6, 40])
    starts = [12, 1, 2, 40]
    tile = CachedTile(model, [len(document) for document in documents])
    logits = tile.next_logits([d[:start] for d, start in zip(documents, starts, strict=True)])
    for document, start, row in zip(whole, starts, logits, strict=True):
        torch.testing.assert_close(row, document[start - 1], atol=2e-5, rtol=0)
    tile.keep_only([0, 2])
    for step in range(4):
        logits = tile.next_logits([[documents[0][12 + step]], [documents[2][2 + step]]])
        torch.testing.assert_close(logits[0], whole[0][12 + step], atol=2e-5, rtol=0)
        torch.testing.assert_close(logits[1], whole[2][2 + step], atol=2e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_side_by_side_equals_one_by_one(model: Llama, temperature: float) -> None:
    prompts = [torch.randint(0, 512, (length,)).tolist() for length in (9, 3, 30, 1, 14)]
    sampling = Sampling(temperature=temperature, top_k=100, top_p=0.95, seed=3)

    def tokens(some: list[list[int]], first: int) -> list[list[int]]:
        held: list[list[int]] = [[] for _ in some]
        for index, token in generate(model, some, 30, range(20, 36), sampling, first):
            held[index].append(token)
        return held

    together = tokens(prompts, 0)
    assert together == [tokens([prompt], index)[0] for index, prompt in enumerate(prompts)]
    assert len({len(answer) for answer in together}) > 1, "they stop at different times"
    for answer in together:
        assert all(token not in range(20, 36) for token in answer[:-1])
        assert len(answer) == 30 or answer[-1] in range(20, 36)


def test_what_may_be_drawn_is_what_transformers_draws_from() -> None:
    scores = torch.randn(1, 300) * 3
    for temperature, top_k, top_p in ((0.7, 0, 0.9), (1.3, 20, 1.0), (0.2, 50, 0.5), (2.0, 7, 0.3)):
        expected = TemperatureLogitsWarper(temperature)(None, scores)
        if top_k:
            expected = TopKLogitsWarper(top_k)(None, expected)
        if top_p < 1:
            expected = TopPLogitsWarper(top_p)(None, expected)
        tokens, probabilities = candidates(scores[0], Sampling(temperature, top_k, top_p))
        found = torch.zeros(300).index_put((tokens,), probabilities)
        torch.testing.assert_close(found, expected.softmax(-1)[0], atol=1e-6, rtol=1e-5)


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=1.0)
    drawn = [choose(probabilities.log(), sampling, generator) for _ in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    torch.testing.assert_close(shares, probabilities, atol=0.03, rtol=0)  # 4 sigma
