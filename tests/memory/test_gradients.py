"""Gradients that are alive, by ZeRO's stage; test_fits_in_memory.py counts them."""

from __future__ import annotations

from dataclasses import replace

from minilora.memory.gradients import gradients
from minilora.memory.job import MemoryJob
from minilora.memory.zero3_gathers import Module, Visit, Zero
from tests.support.article import FILES, article

BLOCK = 41_943_040 // 32  # LoRA of rank 16 in a block, in elements
TABLE = 128_256 * 4096


def at(job: MemoryJob, name: str, backward: bool = True) -> dict[str, int]:
    """Bytes of each line that has some."""
    block = int(name.removeprefix("block ")) if name.startswith("block ") else None
    visit = Visit(Module(name, {}, {}, block), backward, 0, 0, 0)
    return {term.name: term.bytes for term in gradients(job, visit) if term.bytes}


def test_stage_0_has_those_of_all_blocks_that_are_done() -> None:
    one_tile = article(zero=FILES["zero0"], tile_tokens=32768, gather_tokens=32768)
    assert at(one_tile, "block 31") == {}
    assert at(one_tile, "block 30") == {"LoRA gradients, fp32": BLOCK * 4}
    assert at(one_tile, "block 0") == {"LoRA gradients, fp32": 31 * BLOCK * 4}
    assert at(one_tile, "head") == {}
    spans = replace(one_tile, gather_tokens=8192, tile_tokens=8192)
    assert at(spans, "block 31") == {"LoRA gradients, fp32": 32 * BLOCK * 4}, "from the last span"


def test_stages_1_and_2_have_a_bucket_and_later_a_shard() -> None:
    zero = Zero(stage=2, reduce_bucket_size=1000)
    job = article(zero=zero, tile_tokens=32768)
    assert at(job, "block 31") == {}
    assert at(job, "block 30") == {"reduce buckets": 2000}
    overlapping = replace(job, zero=replace(zero, overlap_comm=True))
    assert at(overlapping, "block 30") == {"reduce buckets": 4000}
    spans = replace(job, gather_tokens=8192, tile_tokens=8192)
    assert at(spans, "block 31") == {"LoRA gradients, shard": 2 * -(-32 * BLOCK // 7)}


def test_gradients_are_summed_where_a_span_has_several_tiles() -> None:
    for file in ("zero3", "zero0"):
        lines = at(article(zero=FILES[file]), "block 31")
        assert lines["gradients summed over tiles, fp32"] == 4 * BLOCK
        assert lines["gradients of the last tile"] == 2 * BLOCK
        assert not at(article(zero=FILES[file]), "block 31", backward=False)
    assert not at(article(tile_tokens=32768), "block 31")


def test_a_trained_head_has_its_gradient_from_the_loss_on() -> None:
    adapter = replace(article().adapter, modules_to_save=("lm_head", "embed_tokens"))
    job = article(adapter=adapter, tile_tokens=32768, bf16=False)
    loss = at(job, "head", backward=False)
    assert loss == {"head's gradient, fp32": 4 * TABLE, "head's gradient, a chunk's": 4 * TABLE}
    assert at(job, "head") == {"gradients of head and table, new": 2 * 4 * TABLE}
    assert at(job, "block 31") == {"gradients of head and table, waiting": 4 * TABLE}
    half = at(replace(job, bf16=True), "head", backward=False)
    fp32_logits = 4 * 1024 * 128_256  # gone by then
    assert half["head's gradient, a chunk's"] == 2 * TABLE - fp32_logits
    assert at(job, "embedding") == {
        "gradients of head and table, new": 2 * 4 * TABLE,  # and a copy, to be reduced
        "gradients of head and table, waiting": 4 * TABLE,  # the head's
    }
