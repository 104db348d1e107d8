"""The plan of the article's job, number by number, and what is chosen by it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from minilora.memory.peak import budget
from minilora.memory.ways import keep_most_blocks, longest_document
from minilora.memory.zero3_gathers import Gathers, Zero, in_order
from tests.support.article import ROOT, article


@pytest.mark.parametrize("file", ["zero3", "zero3_offload"])
def test_no_more_than_two_blocks_of_the_8b_model_are_ever_gathered(file: str) -> None:
    """By DeepSpeed's rules with the shipped limits; with its default limits there are more."""
    text = (ROOT / f"minilora/ds_configs/{file}.json").read_text(encoding="utf-8")
    shipped = Zero.of(json.loads(text))
    loose = replace(shipped, stage3_max_live_parameters=10**9)
    block, head = 218_103_808, 128_256 * 4096
    for zero, holds in ((shipped, True), (loose, False)):
        sizes = {"a": block // 2, "b": block // 2}
        blocks = [{f"{index} {name}": size for name, size in sizes.items()} for index in range(32)]
        gathers = Gathers(*in_order(blocks, {"table": head}, {"head": head}), zero, 7)
        most = max(moment.held for moment in gathers.moments)
        assert (most <= head + block + 7 * 4) is holds
        live = [m.held for m in gathers.moments if m.backward and m.module.block is not None]
        assert (max(live) <= 2 * block + 7 * 4) is holds
    assert budget(article(zero=shipped)).total < budget(article(zero=loose)).total


def test_pinned_tensors_take_powers_of_two_of_the_host() -> None:
    """By torch's CachingHostAllocator.h: an input of 48 MiB takes 64, where memory is pinned."""
    for on_gpu, each in ((True, 64), (False, 48)):
        setup = article(offload_activations=True, gather_tokens=6144, on_gpu=on_gpu)
        (inputs,) = (term for term in budget(setup).host if term.name == "block inputs, pinned")
        assert inputs.bytes == 7 * 32 * each * 2**20
    offload = json.loads((ROOT / "minilora/ds_configs/zero3_offload.json").read_text())
    (weights,) = (t for t in budget(article(zero=Zero.of(offload))).host if "weights" in t.name)
    sevenths = [-(-n // 7) * 2 for n in (4096 * 4096, 1024 * 4096, 14336 * 4096, 128256 * 4096)]
    taken = [2 ** math.ceil(math.log2(size)) for size in sevenths]
    matrices = 32 * (2 * taken[0] + 2 * taken[1] + 3 * taken[2]) + 2 * taken[3]
    assert weights.bytes == 7 * (matrices + 65 * 2048)  # and 65 norms


def test_the_articles_job_needs_what_it_may_need() -> None:
    """The goals that were set: 15 GiB in one span, 8 in spans of 8192 tokens, 20 on ZeRO-0."""
    whole = Zero.of(json.loads((ROOT / "minilora/ds_configs/zero0.json").read_text()))
    assert budget(article(rank=16)).total < 15 * 2**30
    assert budget(article(rank=16, gather_tokens=8192)).total < 8 * 2**30
    assert budget(article(rank=16, gather_tokens=8192, zero=whole)).total < 20 * 2**30


def test_the_articles_sums() -> None:
    """The model has 8,030,261,248 parameters; LoRA of rank 16 on all layers 41,943,040."""
    needs = budget(article(rank=16))
    sizes = {term.name: term.bytes for term in needs.terms}
    assert sizes["weights, shard"] == pytest.approx(2 * 8_030_261_248 / 7, rel=1e-3)
    assert sizes["Adam moments, fp32"] == pytest.approx(8 * 41_943_040 / 7, rel=1e-3)
    once, twice = 2 * 525_336_576, 32 * 218_103_808  # embedding and head; each block
    assert needs.gathered == pytest.approx(2 * (once + 2 * twice), rel=0.001)
    away = Zero.of(json.loads((ROOT / "minilora/ds_configs/zero3_offload.json").read_text()))
    host = {term.name: term.bytes for term in budget(article(zero=away, on_gpu=False)).host}
    shards = 2 * 8_030_261_248  # of all ranks, each padded to a whole number of elements
    assert host["weights, pinned"] == pytest.approx(shards, rel=1e-6)
    assert not Zero.of({"zero_optimization": {"offload_param": {"device": "none"}}}).offload_param
    alone = budget(article(ranks=1))
    assert "NCCL, estimate" in sizes and "NCCL, estimate" not in {t.name for t in alone.terms}
    assert article(step_tokens=7000, longest=1000, gather_tokens=2500).spans == 4, "two in each"
    kept = budget(article(keep_blocks=32))
    assert kept.total > 5 * needs.total


def test_blocks_are_kept_while_they_fit() -> None:
    """One token has 160 KB of activations in a block, so a step of 32,768 tokens 5.2 GB."""
    for gib, expected in ((4, 0), (16, 0), (24, 1), (48, 6), (200, 32)):
        limit = gib * 2**30
        way = keep_most_blocks(article(rank=16, step_tokens=32768), limit)
        assert (way.keep_blocks, way.gather_tokens) == (expected, None)
        assert budget(way).total <= 0.85 * limit or expected == 0
        more = replace(way, keep_blocks=min(expected + 1, 32))
        assert budget(more).total > 0.85 * limit or expected == 32
    assert keep_most_blocks(article(step_tokens=2048), 24 * 2**30).keep_blocks == 32
    limit, host = 48 * 2**30, article(rank=16, step_tokens=32768, on_gpu=False)
    keep = keep_most_blocks(host, limit).keep_blocks  # of a machine's memory half is left to others
    fits = [budget(replace(host, keep_blocks=n)).total <= limit / 2 for n in (keep, keep + 1)]
    assert fits == [True, False]


def test_where_nothing_is_gathered_the_step_is_cut_so_that_more_blocks_are_kept() -> None:
    limit, alone = 80 * 2**30, article(rank=16, step_tokens=32768, ranks=1)
    way = keep_most_blocks(alone, limit)
    assert (way.keep_blocks, way.gather_tokens) == (32, 2048)
    assert budget(replace(alone, keep_blocks=13)).total > limit
    two = Zero.of(json.loads((ROOT / "minilora/ds_configs/zero2.json").read_text()))
    assert (
        keep_most_blocks(article(rank=16, step_tokens=32768, zero=two), limit).gather_tokens == 2048
    )
    given = keep_most_blocks(replace(alone, gather_tokens=32768), limit)
    assert given.gather_tokens == 32768 and 0 < given.keep_blocks < 13


def test_the_longest_document_is_the_longest() -> None:
    limit = 20 * 2**30
    longest = longest_document(article(), limit)
    for tokens, fits in ((longest, True), (longest + 128, False)):
        setup = article(step_tokens=tokens, longest=tokens)
        assert (budget(setup).total <= limit) is fits
