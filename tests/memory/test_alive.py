"""The moments of a micro-step: how much is saved by then. The tensors: test_block.py."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest

from minilora.memory.alive import Alive, that_can_be_worst
from minilora.memory.job import MemoryJob
from minilora.memory.peak import gathers_of
from minilora.memory.zero3_gathers import Module, Visit
from tests.support.article import FILES, article

HIDDEN = 32768 * 4096 * 2  # bytes of the hidden states of a step


def lines(job: MemoryJob, name: str, backward: bool = False) -> dict[str, dict[str, int]]:
    """Bytes by moment and line, of a visit that holds 40 bytes, 14 of them its own."""
    block = int(name.removeprefix("block ")) if name.startswith("block ") else None
    visit = Visit(Module(name, {"weight": 7}, {}, block), backward, arriving=60, held=40, own=14)
    return {
        moment: {term.name: term.bytes for term in terms}
        for moment, terms in Alive(job).moments(visit)
    }


def test_inputs_of_blocks_are_saved_one_after_another() -> None:
    for name, inputs in (("block 0", 1), ("block 5", 6), ("block 31", 32), ("norm", 32)):
        for moment in lines(article(), name).values():
            assert moment["block inputs saved"] == inputs * HIDDEN
    assert lines(article(), "block 5", backward=True)["recompute"]["block inputs saved"] == (
        6 * HIDDEN
    ), "later ones are gone"
    assert lines(article(), "decoder")["gather"]["block inputs saved"] == 0


def test_offloaded_inputs_are_on_the_gpu_while_they_are_needed() -> None:
    """Of block 5: the first block's, in backward the one that comes back, and its own."""
    away = article(offload_activations=True)
    forward, backward = lines(away, "block 5"), lines(away, "block 5", backward=True)
    assert forward["forward"]["block inputs saved"] == 2 * HIDDEN
    assert backward["gather"]["block inputs saved"] == 2 * HIDDEN
    assert backward["recompute"]["block inputs saved"] == 3 * HIDDEN


def test_the_last_blocks_save_their_activations() -> None:
    job = article(keep_blocks=2)
    each = lines(article(keep_blocks=32), "block 0")["forward"]["activations saved"]
    for name, blocks in (("block 29", 0), ("block 30", 1), ("block 31", 2)):
        at = lines(job, name)
        assert at["forward"]["activations saved"] == blocks * each
        assert at["gather"]["activations saved"] == max(0, blocks - 1) * each
        backward = lines(job, name, backward=True)
        assert backward["recompute"]["activations saved"] == blocks * each
    assert each > 15 * HIDDEN


def test_parameters_arrive_before_they_are_used() -> None:
    at = lines(article(), "block 5")
    assert (at["gather"]["gathered: block 5"], at["forward"]["gathered: block 5"]) == (14, 14)
    assert at["gather"]["gathered ahead, and buffers"] == 2 * (30 - 7)
    assert at["forward"]["gathered ahead, and buffers"] == 2 * (20 - 7)


def test_each_module_has_its_moments() -> None:
    for job, name, backward, moments in (
        (article(), "model", False, ["gather"]),
        (article(), "embedding", False, ["gather"]),
        (article(), "embedding", True, ["embedding"]),
        (article(), "block 3", False, ["gather", "forward"]),
        (article(), "block 3", True, ["gather", "recompute"]),
        (article(), "head", False, ["gather", "loss"]),
        (article(), "head", True, ["gather", "recompute"]),
        (article(), "norm", True, ["gather"]),
        (article(on_gpu=False), "norm", True, ["recompute"]),  # several steps there
    ):
        assert [*lines(job, name, backward)] == moments


def test_logits_exist_in_both_types_where_the_product_is_bf16() -> None:
    half, full = (lines(article(bf16=bf16), "head")["loss"] for bf16 in (True, False))
    assert half["loss chunk, logits in fp32"] == full["loss chunk, logits in fp32"]
    assert half["loss chunk, logits in fp32"] == 1024 * 128256 * 4
    assert half["loss chunk, logits in bf16"] == 1024 * 128256 * 2
    assert "loss chunk, logits in bf16" not in full


def worst(job: MemoryJob, visits: Iterable[Visit]) -> dict[str, int]:
    """The most bytes by moment."""
    most: dict[str, int] = {}
    alive = Alive(job)
    for visit in visits:
        for moment, terms in alive.moments(visit):
            most[moment] = max(most.get(moment, 0), sum(term.bytes for term in terms))
    return most


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("offload", [False, True])
def test_the_worst_is_among_the_visits_that_are_looked_at(file: str, offload: bool) -> None:
    changes: dict[str, Any] = {"zero": FILES[file], "offload_activations": offload}
    for keep, tokens, packed in product((0, 5, 32), (2048, None), (None, 4)):
        job = article(quantization_bit=packed, keep_blocks=keep, gather_tokens=tokens, **changes)
        visits = gathers_of(job).visits
        looked_at = [*that_can_be_worst(job, visits)]
        assert len(looked_at) < len(visits)
        assert worst(job, looked_at) == worst(job, visits)
