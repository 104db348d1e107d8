"""The same step in other ways: what is recommended, what fits, what an advice saves."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from minilora.memory.peak import GIB, peak_memory
from minilora.memory.ways import (
    Way,
    advice,
    longest_document,
    nearest_that_fit,
    recommended,
    variants,
    ways,
)
from tests.support.article import FILES, article


def test_variants_are_all_combinations() -> None:
    job = article()
    made = [*variants(job, keep_blocks=[0, 4], tile_tokens=[1024, 2048])]
    assert [(one.keep_blocks, one.tile_tokens) for one in made] == [
        (0, 1024), (0, 2048), (4, 1024), (4, 2048)
    ]  # fmt: skip
    assert made[1] == job and [*variants(job)] == [job]


def test_what_is_compared_can_be_set() -> None:
    found = ways(Way("zero3", article(keep_blocks=5, tile_tokens=1024)), FILES)
    assert {way.file for way in found} == {*FILES}
    assert {way.blocks for way in found} == {"recomputed", "offloaded", "5 saved", "saved"}
    assert {way.job.tile_tokens for way in found} == {1024, 2048, 4096, 8192}
    # Less is refused as a setting.
    assert all((way.job.gather_tokens or 10**6) >= way.job.tile_tokens for way in found)


@pytest.mark.parametrize("gib", [6, 8, 10, 12, 16, 24, 48, 80])
def test_what_is_recommended_fits_well_and_fetches_least(gib: int) -> None:
    limit = gib * GIB
    found = ways(Way("zero3", article()), FILES)
    chosen = recommended(found, limit)
    assert chosen
    assert recommended(found, int(1.04 * chosen.peak.total)) is not chosen, "5 % are spare"
    for worth in (
        lambda way: -(way.peak.total <= 0.95 * limit),
        lambda way: way.job.zero.offload_param,
        lambda way: way.peak.gathered,
        lambda way: -way.job.keep_blocks,  # the least recomputed
        lambda way: way.job.offload_activations,  # the least moved
    ):
        least = min(map(worth, found))
        found = [way for way in found if worth(way) == least]
    assert chosen in found


def test_nothing_is_recommended_where_nothing_fits() -> None:
    assert recommended(ways(Way("zero3", article()), FILES), 2 * GIB) is None


def test_what_is_nearest_fits_and_changes_little() -> None:
    asked = Way("zero3", article())
    offers = nearest_that_fit(asked, FILES, 10 * GIB)
    assert [way.changes(asked) for way in offers[:2]] == [
        ["offload_activations: true"], ["gather_tokens: 16384"]
    ]  # fmt: skip
    assert len(offers) == 3 and all(way.peak.total <= 10 * GIB for way in offers)


def test_shorter_documents_are_as_many() -> None:
    job = article(longest=16384, step_tokens=16 * 16384)
    offers = nearest_that_fit(Way("zero3", job), {"zero3": job.zero}, 6 * GIB)
    assert offers and all(way.job.longest < 16384 for way in offers)
    assert all(way.job.step_tokens == 16 * way.job.longest for way in offers)


@pytest.mark.parametrize("moment", ["gather", "forward", "recompute", "loss", "step", "save"])
@pytest.mark.parametrize("keep", [0, 4, 32])
@pytest.mark.parametrize("file", FILES)
def test_each_advice_saves_what_it_says(file: str, keep: int, moment: str) -> None:
    """Each change, planned again by itself."""
    job = article(zero=FILES[file], keep_blocks=keep)
    before = peak_memory(job)
    lines = advice(Way(file, job), FILES, moment, int(23.64 * GIB))
    assert len(lines) == 3
    for line in lines:
        change, _, rest = line.partition(" saves ")
        told = dict(part.split(": ") for part in change.split(", "))
        all_saved = told.pop("disable_gradient_checkpointing", None) is not None
        assert all_saved is (keep == 32 and "keep_blocks" in told)
        new: dict[str, Any] = {}
        for key, value in told.items():
            if key == "deepspeed":
                new["zero"] = FILES[value]
            else:
                new[key] = json.loads(value)

        after = peak_memory(replace(job, **new))
        saved = before.by_moment[moment] - after.by_moment[moment]
        if "at other moments" in rest:
            assert saved == 0
            saved = before.total - after.total
        assert float(rest.split()[0]) == pytest.approx(saved / GIB, rel=0.01) and saved > 0
        more = (after.gathered - before.gathered) / 1e9
        assert (f"costs {more:.3g} GB more to gather" in rest) is (
            more > 0 and "PCIe" not in rest and "one more forward" not in rest
        )
        # 80 Gbit are 10 GB; the inputs of 32 blocks, in bf16, go out and come back.
        assert ("more to gather" not in rest) or f"{more / 10:.2g} s at 80 Gbit/s" in rest
        moved = 2 * 32 * 32768 * 4096 * 2 / 1e9
        assert ("beside the computation" not in rest) or f"{moved:.3g} GB a step over PCIe" in rest


@pytest.mark.parametrize("moment", ["recompute", "loss"])
@pytest.mark.parametrize("limit", [8, 23.64])
def test_advice_takes_the_mildest_value_that_saves_a_tenth(moment: str, limit: float) -> None:
    job = article()
    asked = Way("zero3", job)
    goal = 0.9 * min(limit * GIB, asked.peak.by_moment[moment])
    lines = advice(asked, {}, moment, int(limit * GIB))
    found = [re.match(r"(gather|tile|loss)_tokens: (\d+) saves \S+ GiB, costs", x) for x in lines]
    assert any(found)
    for kind, value in (one.groups() for one in found if one):
        least = {"gather": job.tile_tokens, "tile": 128, "loss": 64}[kind]
        taken, milder = (
            peak_memory(replace(job, **{f"{kind}_tokens": int(value) * n})).by_moment[moment]
            for n in (1, 2)
        )
        assert taken <= goal < milder or (taken > goal and int(value) == least)


def test_the_longest_document_is_the_longest() -> None:
    limit = 20 * 2**30
    longest = longest_document(article(rank=8), limit)
    for tokens, fits in ((longest, True), (longest + 128, False)):
        job = article(rank=8, step_tokens=tokens, longest=tokens)
        assert (peak_memory(job).total <= limit) is fits
