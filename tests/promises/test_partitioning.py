"""What partitioning must not change, and what it must save, in real processes."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minilora.files.model_config import read_model_config
from minilora.files.weights import read_checkpoint
from tests.support.runs import (
    Ground,
    adapter,
    base_weights,
    check_loading,
    check_output,
    costs,
    log,
    run_jobs,
    stage_file,
)
from tests.support.two_ranks import two_rank_jobs

Jobs = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def two_ranks(ground: Ground, launch: Callable[..., tuple[int, str]]) -> Jobs:
    """Jobs on 2 ranks: accumulation for the traffic, recompute per stage, tiles and spans."""
    jobs = two_rank_jobs(ground)
    run_jobs(launch, 2, list(jobs.values()))
    return jobs


@pytest.fixture(scope="session")
def one_rank(ground: Ground, launch: Callable[..., tuple[int, str]]) -> Jobs:
    """The same steps as `seven_ranks`, by one process without partitions."""
    job = ground.job(
        "one", "tiny", max_steps=-1, num_train_epochs=2, per_device_train_batch_size=14
    )
    job["deepspeed"] = str(stage_file(ground.folder, 0))
    run_jobs(launch, 1, [job])
    return {"ragged": job}


@pytest.fixture(scope="session")
def seven_ranks(ground: Ground, launch: Callable[..., tuple[int, str]]) -> Jobs:
    """75 rows in steps of 14 on 7 ranks: the last step of an epoch leaves two ranks idle."""
    changes = {
        "max_steps": -1,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "deepspeed": str(stage_file(ground.folder, 3)),
        "keep_weights": True,
    }
    jobs = {"ragged": ground.job("seven", "tiny", **changes)}
    packed = {**changes, "max_steps": 1, "warmup_steps": 0, "quantization_bit": 4}
    jobs["four bits"] = ground.job("seven-four-bits", "packable", **packed)
    run_jobs(launch, 7, list(jobs.values()))
    return jobs


def test_two_ranks_load_their_halves_bit_for_bit(two_ranks: Jobs) -> None:
    check_loading(two_ranks["accumulation 4"], 2)
    check_loading(two_ranks["tied"], 2)
    check_loading(two_ranks["bf16"], 2)
    check_loading(two_ranks["four bits 4"], 2)


def test_seven_ranks_load_their_sevenths_bit_for_bit(seven_ranks: Jobs) -> None:
    check_loading(seven_ranks["ragged"], 7)
    check_loading(seven_ranks["four bits"], 7)


@pytest.mark.parametrize("accumulation", [4, 8])
def test_an_optimizer_step_gathers_less_than_twice_the_model(
    two_ranks: Jobs, accumulation: int
) -> None:
    """HF Trainer with LLaMA-Factory's ZeRO-3 file gathers 7.8 times the model at 4."""
    job = two_ranks[f"accumulation {accumulation}"]
    model_bytes = read_checkpoint(read_model_config(Path(job["model_name_or_path"]))).total_bytes
    for cost in costs(job):
        first, *steady = (gathered / model_bytes for gathered in cost["gathered"])
        assert len(steady) == 2
        assert all(1.0 < ratio <= 1.9 for ratio in steady), (first, steady)


def test_weights_in_four_bits_are_gathered_packed_whatever_the_accumulation(
    two_ranks: Jobs,
) -> None:
    job = two_ranks["four bits 4"]
    shape = read_model_config(Path(job["model_name_or_path"]), quantization_bit=4).shape
    assert shape.held_bytes(4) < 0.6 * replace(shape, packed=False).held_bytes(4)
    plain = costs(two_ranks["not packed"])
    more = costs(two_ranks["four bits 8"])
    for cost, unpacked, twice in zip(costs(job), plain, more, strict=True):
        _, *steady = cost["gathered"]
        assert all(1.0 < gathered / shape.held_bytes(4) <= 1.9 for gathered in steady)
        assert steady == twice["gathered"][1:]
        assert max(steady) < 0.7 * min(unpacked["gathered"])


def test_a_new_adapter_over_four_bits_starts_where_its_base_is(two_ranks: Jobs) -> None:
    """DoRA's magnitudes are the norms of the rows as they are unpacked."""
    start = log(two_ranks["new four bits"], "loss")[0]
    with_dora = log(two_ranks["new DoRA in four bits"], "loss")
    assert with_dora[0] == pytest.approx(start, rel=1e-6)
    assert with_dora[-1] != pytest.approx(log(two_ranks["new four bits"], "loss")[-1], rel=1e-4)
    assert start != pytest.approx(log(two_ranks["not packed"], "loss")[0], rel=1e-3)


@pytest.mark.parametrize("stage", range(4))
def test_recompute_changes_no_bit_in_tiles_with_dropout(two_ranks: Jobs, stage: int) -> None:
    kept, again = two_ranks[f"stage {stage} keep True"], two_ranks[f"stage {stage} keep False"]
    assert log(kept, "loss") == log(again, "loss")
    assert log(kept, "grad_norm") == log(again, "grad_norm")
    others = adapter(again)
    for name, tensor in adapter(kept).items():
        assert torch.equal(tensor, others[name]), name


def test_keeping_one_block_of_two_changes_no_bit_and_no_gather(two_ranks: Jobs) -> None:
    kept, again = two_ranks["kept"], two_ranks["tile 100 gather 300"]
    assert log(kept, "loss") == log(again, "loss")
    for name, tensor in adapter(again).items():
        assert torch.equal(tensor, adapter(kept)[name]), name
    for mine, theirs in zip(costs(kept), costs(again), strict=True):
        assert mine["gathered"] == theirs["gathered"]


def test_stages_agree_with_dropout(two_ranks: Jobs) -> None:
    losses = [log(two_ranks[f"stage {stage} keep False"], "loss") for stage in range(4)]
    assert all(other == pytest.approx(losses[0], rel=1e-6) for other in losses[1:])


@pytest.mark.parametrize("limits", ["1 gather None", "100 gather 100", "100 gather 300",
                                    "200 gather 1000000"])  # fmt: skip
def test_tiles_and_spans_change_no_loss(two_ranks: Jobs, limits: str) -> None:
    whole, cut = two_ranks["tile 4096 gather None"], two_ranks[f"tile {limits}"]
    steps = cut["max_steps"]
    assert log(cut, "loss") == pytest.approx(log(whole, "loss")[:steps], rel=1e-6)
    assert log(cut, "grad_norm") == pytest.approx(log(whole, "grad_norm")[:steps], rel=1e-5)


def test_inputs_in_host_memory_change_no_bit(two_ranks: Jobs) -> None:
    device, host = two_ranks["tile 100 gather 300"], two_ranks["offloaded"]
    assert log(device, "loss") == log(host, "loss")
    assert log(device, "grad_norm") == log(host, "grad_norm")


def test_spans_cost_gathers(two_ranks: Jobs) -> None:
    """Otherwise the test above would compare a thing with itself."""
    one, many = (
        costs(two_ranks[f"tile {limits}"])[0]["gathered"][-1]
        for limits in ("4096 gather None", "100 gather 100")
    )
    assert many > 2 * one


def test_batch_and_accumulation_are_only_a_product(two_ranks: Jobs) -> None:
    assert log(two_ranks["batch 1"], "loss") == log(two_ranks["batch 8"], "loss")
    gathered = [costs(two_ranks[f"batch {batch}"])[0]["gathered"] for batch in (1, 8)]
    assert gathered[0] == gathered[1]


def test_bf16_trains_like_fp32(two_ranks: Jobs) -> None:
    """bf16 has 8 bits of mantissa: losses agree to about 1 %, and the updates are not lost."""
    exact = {**two_ranks["bf16"], "output_dir": two_ranks["accumulation 4"]["output_dir"]}
    assert log(two_ranks["bf16"], "loss") != log(exact, "loss")
    start = load_file(Path(two_ranks["bf16"]["adapter_name_or_path"]) / "adapter_model.safetensors")
    for name, tensor in adapter(two_ranks["bf16"]).items():
        assert tensor.dtype == torch.float32
        moved = (tensor - start[name]).abs()
        # Three AdamW steps at up to 2e-4 move a weight of 0.1 by less than a bf16 step of it.
        assert 0 < float(moved.max()) and float((moved > 0).float().mean()) > 0.9, name


def test_deepspeeds_monitor_gets_the_figures_of_the_log(two_ranks: Jobs, ground: Ground) -> None:
    with (ground.folder / "m" / "minilora_loss.csv").open(encoding="utf-8") as file:
        _, *lines = csv.reader(file)
    assert [int(step) for step, _ in lines] == [1, 2, 3]
    assert [float(value) for _, value in lines] == log(two_ranks["bf16"], "loss")


def test_the_log_has_the_memory_of_every_rank(two_ranks: Jobs) -> None:
    for figures in log(two_ranks["bf16"], "rss_gib"):
        assert len(figures) == 2 and min(figures) > 0.05


def test_new_adapters_start_where_the_base_model_is(two_ranks: Jobs) -> None:
    """With DoRA too: its magnitudes are the norms of rows that no rank holds whole."""
    plain = log(two_ranks["new"], "loss")[0]
    for stage in range(4):
        assert log(two_ranks[f"family {stage} False"], "loss")[0] == pytest.approx(plain, rel=1e-6)


def test_stages_agree_on_the_family(two_ranks: Jobs) -> None:
    first, *others = (two_ranks[f"family {stage} False"] for stage in range(4))
    for other in others:
        assert log(other, "loss") == pytest.approx(log(first, "loss"), rel=1e-5)
        assert log(other, "grad_norm") == pytest.approx(log(first, "grad_norm"), rel=1e-4)


def test_recompute_changes_no_bit_of_the_family(two_ranks: Jobs) -> None:
    kept, again = two_ranks["family keep True"], two_ranks["family keep False"]
    assert log(kept, "loss") == log(again, "loss")
    others = adapter(again)
    assert any(name.endswith("lora_magnitude_vector") for name in others)
    assert all(torch.equal(tensor, others[name]) for name, tensor in adapter(kept).items())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_family_trains_in_bf16(two_ranks: Jobs, stage: int) -> None:
    exact, low = two_ranks[f"family {stage} False"], two_ranks[f"family {stage} True"]
    assert log(low, "loss") != log(exact, "loss")
    assert log(low, "loss") == pytest.approx(log(exact, "loss"), rel=1e-2)
    assert log(low, "grad_norm") == pytest.approx(log(exact, "grad_norm"), rel=5e-2)
    base = base_weights(Path(exact["model_name_or_path"]))
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        start = base[name].bfloat16().float() if stage else base[name]
        moved = adapter(low)[f"base_model.model.{name}"] - start
        expected = adapter(exact)[f"base_model.model.{name}"] - base[name]
        # AdamW moves by the sign of a gradient, which is right nearly everywhere in bf16.
        rows = expected.abs().amax(1) > 1e-4  # the others only decayed
        near = (moved - expected)[rows].abs() < 0.5 * expected[rows].abs().max()
        assert rows.any() and near.float().mean() > 0.95, name


def test_training_on_a_merged_model_starts_where_the_adapter_was(two_ranks: Jobs) -> None:
    going_on, merged = two_ranks["tile 4096 gather None"], two_ranks["merged"]
    assert log(merged, "loss")[0] == pytest.approx(log(going_on, "loss")[0], rel=1e-5)
    assert log(merged, "loss")[0] != pytest.approx(log(two_ranks["new"], "loss")[0], rel=1e-3)


def test_ragged_rows_on_seven_ranks_equal_one_rank(seven_ranks: Jobs, one_rank: Jobs) -> None:
    seven, one = seven_ranks["ragged"], one_rank["ragged"]
    assert len(log(seven, "loss")) == 2 * 6  # 75 rows in steps of 14, two epochs
    assert log(seven, "loss") == pytest.approx(log(one, "loss"), rel=1e-6)
    for name, tensor in adapter(one).items():
        torch.testing.assert_close(adapter(seven)[name], tensor, rtol=1e-4, atol=1e-6)


def test_one_process_without_a_launcher_trains(
    ground: Ground, launch: Callable[..., tuple[int, str]]
) -> None:
    job = ground.job("launched-alone", "tiny", max_steps=2, per_device_train_batch_size=1)
    words = [f"--{key}={value}" for key, value in job.items()]
    code, output = launch(1, ["-m", "minilora.train", *words], with_="alone")
    assert code == 0, output
    assert len(log(job, "loss")) == 2
    check_output(output, "ZeRO-3 on 1 x cpu", "2 of 2 blocks keep their activations")
