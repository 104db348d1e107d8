"""ZeRO-3's limits: derived from the block as it is held, unless the file says a number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minilora.files.deepspeed_file import Facts, find_ds_config, resolve_ds_config
from minilora.files.zero3_limits import limits_from_block
from minilora.memory.peak import peak_memory
from minilora.memory.zero3_gathers import Zero
from minilora.settings.settings import TrainSettings
from tests.support.article import FILES, article, example_shape

MODELS = ("llama-3.1-8b", "llama-3.1-70b")


@pytest.mark.parametrize("file", ["zero3", "zero3_offload"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("bits", [None, 4])
def test_whole_blocks_are_fetched_one_ahead_and_an_adapter_is_never_split(
    model: str, bits: int | None, file: str
) -> None:
    shape = example_shape(model, bits)
    config = resolve_ds_config(find_ds_config(file), TrainSettings(), Facts(7, shape, True))
    zero = config["zero_optimization"]
    matrices = {
        name: rows * columns * (17 if bits else 32) // 32
        for name, (rows, columns) in shape.linear_shapes().items()
    }
    block = sum(matrices.values())
    widest = max(max(size) for size in shape.linear_shapes().values())
    assert widest * 64 <= zero["stage3_param_persistence_threshold"] < min(matrices.values())
    assert list(matrices)[-1] == "down_proj"
    assert block - matrices["down_proj"] < zero["stage3_prefetch_bucket_size"] <= block
    assert 2 * block - matrices["down_proj"] < zero["stage3_max_live_parameters"] <= 2 * block
    assert block <= zero["stage3_max_reuse_distance"] < 2 * block
    assert widest * 64 <= zero["reduce_bucket_size"]


@pytest.mark.parametrize("gather_tokens", [None, 8192])
@pytest.mark.parametrize("rank", [16, 64])
def test_for_8b_in_bf16_they_are_the_numbers_that_were_written_by_hand(
    rank: int, gather_tokens: int | None
) -> None:
    by_hand = Zero(
        stage=3,
        reduce_bucket_size=10_000_000,
        stage3_prefetch_bucket_size=200_000_000,
        stage3_max_live_parameters=436_000_000,
        stage3_max_reuse_distance=250_000_000,
        stage3_param_persistence_threshold=1_000_000,
    )
    derived = peak_memory(article(rank, zero=FILES["zero3"], gather_tokens=gather_tokens))
    written = peak_memory(article(rank, zero=by_hand, gather_tokens=gather_tokens))
    assert derived.by_moment == written.by_moment and derived.gathered == written.gathered


def test_what_the_file_says_stands(tmp_path: Path) -> None:
    """A number, and "auto", which is the Trainer's; the rest follows from the block."""
    path = tmp_path / "own.json"
    said = {"stage": 3, "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 10**9}
    said |= {"stage3_param_persistence_threshold": "auto"}
    path.write_text(json.dumps({"zero_optimization": said}), encoding="utf-8")
    shape = example_shape("llama-3.1-8b", 4)
    config = resolve_ds_config(path, TrainSettings(), Facts(7, shape, True))
    assert config["zero_optimization"] == {
        **said,
        "stage3_param_persistence_threshold": 10 * 4096,
        "stage3_max_reuse_distance": limits_from_block(shape)["stage3_max_reuse_distance"],
    }


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_below_stage_3_nothing_is_added(tmp_path: Path, stage: int) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}), encoding="utf-8")
    config = resolve_ds_config(path, TrainSettings(), Facts(7, example_shape(MODELS[0]), True))
    assert config["zero_optimization"] == {"stage": stage}
