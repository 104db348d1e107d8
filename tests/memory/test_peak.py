"""The plan of the question's job, number by number."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from minilora.memory.peak import CONTEXT, NCCL, SLACK, peak_memory
from tests.support.article import FILES, article

WEIGHTS, LORA = 8_030_261_248, 41_943_040  # elements of the 8B model, and of rank 16 on all layers


def test_the_job_needs_what_it_may_need() -> None:
    """The goals that were set: 15 GiB in one span, 8 in spans of 8192 tokens, 20 on ZeRO-0."""
    assert peak_memory(article()).total < 15 * 2**30
    assert peak_memory(article(gather_tokens=8192)).total < 8 * 2**30
    assert peak_memory(article(gather_tokens=8192, zero=FILES["zero0"])).total < 20 * 2**30
    assert peak_memory(article(keep_blocks=32)).total > 5 * peak_memory(article()).total


def test_weights_and_optimizer_states_are_split() -> None:
    sizes = {term.name: term.bytes for term in peak_memory(article()).terms}
    assert sizes["weights, shard"] == pytest.approx(2 * WEIGHTS / 7, rel=1e-3)
    assert sizes["Adam moments, fp32"] == pytest.approx(8 * LORA / 7, rel=1e-3)
    assert sizes["LoRA master, fp32"] == pytest.approx(4 * LORA / 7, rel=1e-3)


def test_each_block_is_gathered_twice() -> None:
    once, twice = 2 * 525_336_576, 32 * 218_103_808  # embedding and head; each block
    assert peak_memory(article()).gathered == pytest.approx(2 * (once + 2 * twice), rel=0.001)
    assert peak_memory(article(ranks=1)).gathered == 0
    assert peak_memory(article(zero=FILES["zero2"])).gathered == 0


def test_the_peak_is_the_worst_of_its_moments() -> None:
    for file, zero in FILES.items():
        peak = peak_memory(article(zero=zero))
        moment = peak.peak_moment.split(",")[0]
        assert peak.tensors == peak.by_moment[moment] == max(peak.by_moment.values()), file
        assert peak.by_moment.keys() == {
            "gather", "forward", "loss", "recompute", "step", "save"
        }  # fmt: skip
        assert sum(peak.parts.values()) == peak.total == sum(term.bytes for term in peak.terms)


def test_what_is_no_tensor_is_counted_beside_them() -> None:
    """Holes where blocks are gathered, at least; else a share of the tensors."""
    block = 2 * 218_103_808
    for job, slack in (
        (article(), 1.5 * block),
        (article(step_tokens=8 * 32768), SLACK),
        (article(ranks=1), SLACK),
        (article(zero=FILES["zero2"]), SLACK),
    ):
        peak = peak_memory(job)
        expected = slack if slack > 1 else int(slack * peak.tensors)
        assert peak.parts["fixed"] == CONTEXT + (NCCL if job.ranks > 1 else 0) + expected
    assert "fixed" not in peak_memory(article(on_gpu=False)).parts


def test_a_stream_for_gathers_has_memory_of_its_own() -> None:
    """What torch keeps for two streams adds up, though the most of each is not at the same time."""
    one = peak_memory(article())
    zero = replace(FILES["zero3"], overlap_comm=True)
    two = peak_memory(article(zero=zero))
    assert two.by_moment == one.by_moment and two.tensors == one.tensors
    head, block = 2 * 525_336_576, 2 * 218_103_808
    others = one.tensors - head  # the peak is at the loss, where the head is gathered
    most_gathered = head + block  # before, the head comes while the last block is still there
    more = others + most_gathered + head - one.tensors
    assert two.total - one.total == pytest.approx(more, rel=0.02)
    # With one rank nothing is gathered.
    alone = article(ranks=1)
    assert peak_memory(replace(alone, zero=zero)).total == peak_memory(alone).total


def test_the_step_and_saving_need_less() -> None:
    """AdamW's temporaries are as large as its states and the masters; saving is by tensor."""
    peak = peak_memory(article())
    sizes = {term.name: term.bytes for term in peak.terms}
    states = sizes["Adam moments, fp32"] + sizes["LoRA master, fp32"]
    largest = 16 * 14336  # of gate_proj, in fp32 twice: gathered and put together
    assert peak.by_moment["step"] - states == peak.by_moment["save"] - 8 * largest
    assert peak.by_moment["step"] < peak.by_moment["gather"]


def test_pinned_tensors_take_powers_of_two_of_the_host() -> None:
    """By torch's CachingHostAllocator.h: an input of 48 MiB takes 64, where memory is pinned."""
    for on_gpu, each in ((True, 64), (False, 48)):
        job = article(offload_activations=True, gather_tokens=6144, on_gpu=on_gpu)
        host = {term.name: term.bytes for term in peak_memory(job).host}
        assert host["block inputs, pinned"] == 7 * 32 * each * 2**20
    host = {t.name: t.bytes for t in peak_memory(article(zero=FILES["zero3_offload"])).host}
    sevenths = [-(-n // 7) * 2 for n in (4096 * 4096, 1024 * 4096, 14336 * 4096, 128256 * 4096)]
    taken = [2 ** math.ceil(math.log2(size)) for size in sevenths]
    matrices = 32 * (2 * taken[0] + 2 * taken[1] + 3 * taken[2]) + 2 * taken[3]
    assert host["weights, pinned"] == 7 * (matrices + 65 * 2048)  # and 65 norms


def test_the_host_holds_what_is_offloaded() -> None:
    job = article(zero=FILES["zero3_offload"], on_gpu=False)
    host = {term.name: term.bytes for term in peak_memory(job).host}
    # Of all ranks, each shard padded to a whole number of elements.
    assert host["weights, pinned"] == pytest.approx(2 * WEIGHTS, rel=1e-6)
    assert host["page cache of the files"] == 2 * WEIGHTS
    assert host["processes, estimate"] == 7 * 2 * 2**30
