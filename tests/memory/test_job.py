"""What the settings mean in tokens, blocks and bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minilora.memory.job import kept_blocks, memory_job
from minilora.settings.errors import RequestError
from minilora.settings.settings import ModelSettings, Settings, TrainSettings
from tests.support.article import FILES, article


def test_a_step_is_cut_into_spans_tiles_pieces_and_chunks() -> None:
    job = article()
    assert (job.step_tokens, job.longest) == (32768, 2048)
    assert (job.span, job.tile, job.piece, job.loss_chunk) == (32768, 2048, 2048, 1024)
    short = replace(job, gather_tokens=8192, tile_tokens=4096)
    assert (short.span, short.tile, short.piece, short.spans) == (8192, 4096, 4096, 4)
    assert article(step_tokens=7000, longest=1000, gather_tokens=2500).spans == 4, "two in each"


def test_a_long_document_is_one_span_and_one_tile() -> None:
    job = article(step_tokens=20000, longest=20000, gather_tokens=8192)
    assert (job.span, job.tile, job.piece, job.spans) == (20000, 20000, 2048, 1)


def test_tensors_of_an_adapter_are_those_of_its_largest_block() -> None:
    job = article()
    assert job.lora["q_proj lora_A"] == 16 * 4096
    adapter = replace(job.adapter, rank_pattern={"layers.3.self_attn.q_proj": 64})
    assert replace(job, adapter=adapter).lora["q_proj lora_A"] == 64 * 4096
    assert replace(job, adapter=replace(adapter, modules_to_save=("lm_head",))).whole == {
        "lm_head.weight": 128256 * 4096
    }


def test_pinned_tensors_take_powers_of_two_on_a_gpu() -> None:
    assert article().pinned(24 * 2**20) == 64 * 2**20  # 48 MiB in bf16
    assert article().pinned(2**24) == 2**25
    assert article(on_gpu=False).pinned(24 * 2**20) == 48 * 2**20


def test_the_settings_say_which_blocks_are_kept() -> None:
    shape = article().shape
    for train, model, blocks in (
        (TrainSettings(), ModelSettings(), 0),
        (TrainSettings(keep_blocks=4), ModelSettings(), 4),
        (TrainSettings(), ModelSettings(disable_gradient_checkpointing=True), 32),
    ):
        settings = Settings(model=model, train=train)
        assert kept_blocks(settings, shape) == blocks
        assert memory_job(settings, shape, FILES["zero3"], 7).keep_blocks == blocks
    with pytest.raises(RequestError, match="keep_blocks: 33; the model has 32 blocks"):
        kept_blocks(Settings(train=TrainSettings(keep_blocks=33)), shape)
