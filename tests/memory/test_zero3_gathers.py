"""What ZeRO-3 holds gathered, by DeepSpeed's rules; bytes are counted in test_fits_in_memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minilora.memory.peak import peak_memory
from minilora.memory.zero3_gathers import Gathers, Module, Zero, modules_in_order
from tests.support.article import FILES, article

BLOCK, TABLE = 218_103_808, 128_256 * 4096  # of the 8B model, in elements


def test_the_section_of_a_file_is_read() -> None:
    assert FILES["zero3"].stage == 3 and FILES["zero3_offload"].offload_param
    assert not Zero.of({"zero_optimization": {"offload_param": {"device": "none"}}}).offload_param
    assert Zero.of({}) == Zero()
    assert not FILES["zero3"].overlap_comm and FILES["zero2"].overlap_comm
    for said, stage, overlaps in ((None, 3, True), (None, 2, False), (False, 3, False)):
        section = {"stage": stage, "overlap_comm": said}
        assert Zero.of({"zero_optimization": section}).overlap_comm is overlaps
    assert Zero.of({"zero_optimization": {"stage": 3}}).overlap_comm


@pytest.mark.parametrize("file", ["zero3", "zero3_offload"])
def test_no_more_than_two_blocks_of_the_8b_model_are_ever_gathered(file: str) -> None:
    """With the shipped limits; with DeepSpeed's default limits there are more."""
    shipped = FILES[file]
    loose = replace(shipped, stage3_max_live_parameters=10**9)
    for zero, holds in ((shipped, True), (loose, False)):
        blocks = [{f"{n} a": BLOCK // 2, f"{n} b": BLOCK // 2} for n in range(32)]
        modules, backward_from = modules_in_order(blocks, {"table": TABLE}, {"head": TABLE})
        visits = Gathers(modules, backward_from, zero, 7).visits
        most = max(visit.held for visit in visits)
        assert (most <= TABLE + BLOCK + 7 * 4) is holds
        in_backward = [v.held for v in visits if v.backward and v.module.block is not None]
        assert (max(in_backward) <= 2 * BLOCK + 7 * 4) is holds
    assert peak_memory(article(zero=shipped)).total < peak_memory(article(zero=loose)).total


def test_a_module_is_visited_forward_and_backward() -> None:
    modules, backward_from = modules_in_order([{"0 a": 5}, {"1 a": 5}], {"table": 9}, {"table": 9})
    names = ["model", "decoder", "embedding", "block 0", "block 1", "norm", "head"]
    assert [module.name for module in modules[:backward_from]] == names
    names = ["model", "head", "norm", "decoder", "block 1", "block 0"]
    assert [module.name for module in modules[backward_from:]] == names
    trained, _ = modules_in_order([{"0 a": 5}], {"table": 9}, {"head": 9}, embedding_trained=True)
    assert trained[-1].name == "embedding"


def one_pass(zero: Zero, *sizes: dict[str, int]) -> Gathers:
    """Of modules that are called once, one after another, by 2 ranks."""
    modules = [Module(f"block {at}", own, own, at) for at, own in enumerate(sizes)]
    return Gathers(modules, len(modules), zero, 2)


def test_parameters_are_copied_out_of_the_buffer_of_several() -> None:
    """One alone keeps the buffer, padded to a multiple of the ranks; several are copied."""
    plain = Zero(stage=3, stage3_prefetch_bucket_size=0, stage3_max_reuse_distance=0)
    (alone,) = one_pass(plain, {"a": 5}).visits
    assert (alone.arriving, alone.held) == (6, 6)
    (both,) = one_pass(plain, {"a": 5, "b": 4}).visits
    assert (both.arriving, both.held) == (10 + 9, 9)


def test_prefetching_stops_at_the_bucket_and_counts_its_buffer() -> None:
    ahead = Zero(stage=3, stage3_prefetch_bucket_size=5, stage3_max_reuse_distance=0)
    first, second, third = one_pass(ahead, {"a": 4}, {"b": 4, "c": 4}, {"d": 4}).visits
    assert first.held == 4 + 8  # b fills 4 of 5, c is the last one, which may go beyond
    assert (second.arriving, second.held) == (8 + 8, 8 + 4)  # copied; d is alone in its buffer
    assert (third.arriving, third.held) == (4, 4)


def test_all_buffers_are_there_while_parameters_arrive() -> None:
    """DeepSpeed waits in the order of a set: the worst order counts, in every process alike."""
    ahead = Zero(stage=3, stage3_prefetch_bucket_size=5, stage3_max_reuse_distance=0)
    own = {"b": 4, "c": 4, "e": 4, "f": 4}
    _, second = one_pass(ahead, {"a": 4}, own).visits
    assert second.arriving == 16 + 8 + 8, "b and c came ahead, e and f came in a call of their own"


def test_what_is_used_again_soon_stays() -> None:
    """Forward and backward of the last block: it is gathered once, all others twice."""
    blocks = [{f"{n} a": 10} for n in range(3)]
    gathered = {}
    for distance in (0, 10):
        zero = Zero(stage=3, stage3_prefetch_bucket_size=0, stage3_max_reuse_distance=distance)
        modules, backward_from = modules_in_order(blocks, {}, {})
        gathered[distance] = Gathers(modules, backward_from, zero, 2).gathered
    assert gathered == {0: 60, 10: 50}
