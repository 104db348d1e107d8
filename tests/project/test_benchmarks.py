"""The measurements run, and compare like with like. What they measure is no test."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu
from benchmarks.leaves import Leaf, leaves
from benchmarks.memory import sweep
from benchmarks.speed import compare
from benchmarks.turns import ROOT, Player, Variant
from benchmarks.workloads import SIZES, padded, rows, weight
from tests.support.processes import Launch


@pytest.mark.slow
def test_losses_and_gradients_agree_and_every_step_is_timed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.speed", "--device", "cpu", "--size", "tiny"]
    command += ["--timed", "2", "--out", str(tmp_path / "new"), "--groups", "skewed", "one-of-7"]
    command += ["--only", "minilora-zero3-skewed", "minilora-1-of-7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "minilora-zero3-skewed: loss " in done.stderr
    head, *lines = map(
        json.loads,
        (tmp_path / "new" / "speed-cpu-tiny-skewed-one-of-7.json").read_text().splitlines(),
    )
    assert head["torch"] == version("torch")
    found = {line["variant"]: line for line in lines}
    assert list(found) == ["trainer-zero3-skewed", "minilora-zero3-skewed", "trainer-1-of-7",
                           "minilora-1-of-7"]  # fmt: skip
    for line in lines:
        assert 0 < line["step_seconds"]["p10"] <= line["step_seconds"]["p90"]
        assert line["tokens_per_second"]["median"] <= line["padded_tokens_per_second"] + 1e-6
    ours, theirs = found["minilora-1-of-7"], found["trainer-1-of-7"]
    # One gather of each block for the step's four micro-batches, not one for each of them.
    assert 0 < 3 * ours["gathered_bytes"] < theirs["gathered_bytes"]


@pytest.mark.slow
def test_the_gpu_command_runs_on_a_cpu(tmp_path: Path) -> None:
    """Its parts in their order, a line each as it comes, the table last.

    The skewed rows have no peer here, and are compared with none: the equal ones are not theirs.
    """
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--size", "tiny"]
    command += ["--only", "trainer", "minilora", "minilora-skewed", "--cases", "1"]
    command += ["--out", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    printed = done.stdout.splitlines()
    assert [json.loads(line) for line in printed[: len(rows)]] == rows
    parts = [row["part"] for row in rows]
    assert list(dict.fromkeys(parts)) == ["versions", "parity", "memory", "speed", "four-bits"]
    assert not [row for row in rows if "error" in row and "ok" not in row]
    assert all(row["ok"] for row in rows if row["part"] == "parity")
    measured = [row for row in rows if "measured" in row]
    assert [row["case"].split()[0] for row in measured] == ["zero3"]
    for row in measured:
        assert row["predicted"]["run"] == pytest.approx(row["measured"]["run"], rel=0.02)
    assert all(row["same bits"] for row in rows if "matrix" in row)
    names = [row["variant"] for row in rows if row["part"] == "speed"]
    assert names == ["matmul", "trainer", "minilora", "minilora-skewed"]
    assert all(0 < row["share_of_matmul"] < 2 for row in rows if "step_seconds" in row)
    assert "predicted" in "".join(printed[len(rows) :]) and "tokens/s" in printed[-1]


@pytest.mark.slow
def test_the_next_block_is_gathered_while_one_computes(launch: Launch) -> None:
    """From before it begins until after it ends, in both directions; without prefetching never.

    But for the first block of backward: the limit of two blocks has no room beside the head.
    """
    for words, blocks in ([], 3), (["--no_prefetch"], 0):
        code, output = launch(1, ["-m", "benchmarks.overlap", *words], with_="alone")
        assert code == 0, output
        (found,) = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        assert found["of"] == 3
        for direction in ("forward", "backward"):
            for end in ("begins", "ends"):
                late = direction == "backward" and blocks > 0
                assert found[f"as {direction} {end}"] == blocks - late, found


def gpu_run(tmp_path: Path, minutes: float = 5) -> gpu.Run:
    words = ["--device", "cpu", "--size", "tiny", "--minutes", str(minutes)]
    return gpu.Run(gpu.read([*words, "--out", str(tmp_path / "rows.jsonl")]))


@pytest.mark.slow
def test_a_process_that_outlasts_its_time_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ('{"a": 1}', "no row", '{"a": 2}', '{"cut off')
    (tmp_path / "slow_part.py").write_text(
        f"import time\nprint(*{lines!r}, sep='\\n', flush=True)\ntime.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setitem(gpu.LIMITS, "memory", 2.0)
    run = gpu_run(tmp_path)
    run.child("memory", "slow_part")
    late, *rows = run.rows
    assert "still running after 2 s" in late["error"] and late["command"] == ["slow_part"]
    assert rows == [{"part": "memory", "a": 1}, {"part": "memory", "a": 2}]


def test_whatever_stops_a_variant_the_next_one_runs(tmp_path: Path) -> None:
    """Tiles of a size that JSON has no word for: nobody foresaw this TypeError."""
    run = gpu_run(tmp_path)
    run.limit = 1e12
    broken = [("single", Variant(name, "bare", tile_tokens=1j)) for name in "ab"]  # type: ignore[arg-type]
    run.speed(broken)
    assert [row["variant"] for row in run.rows] == ["a", "b"]
    assert all("TypeError" in row["error"] and row["took"] < 5 for row in run.rows)
    assert list(run.table()) == ["2 rows failed: see their lines"]


def test_nothing_starts_when_the_time_is_over(tmp_path: Path) -> None:
    run = gpu_run(tmp_path, minutes=0)
    run.limit = 1e12
    run.child("parity", "benchmarks.gpu")
    run.speed(gpu.variants(SIZES["8b"]))
    assert run.rows == []


def test_what_is_measured_first_on_a_gpu() -> None:
    """By the goals: three minutes suffice for them."""
    found = [variant.name for _, variant in gpu.variants(SIZES["8b"])]
    assert tuple(found[: len(gpu.ORDER)]) == gpu.ORDER and gpu.NEEDS_MORE in found
    assert len(found) == len(set(found))
    first = found[: gpu.FIRST_VARIANTS]
    assert first == ["trainer", "minilora", "minilora-keep-0"]
    cases = gpu.cases("8b", on_gpu=True)
    assert [case.name for case in cases[: gpu.FIRST_CASES]] == [
        "zero3", *(f"zero{stage} gather_tokens=8192" for stage in (3, 0, 2))
    ]  # fmt: skip
    assert sorted(map(str, cases)) == sorted(map(str, sweep("8b", True)))


def player(folder: Path, name: str, loss: float, grad: torch.Tensor) -> Player:
    path = folder / f"{name}.pt"
    torch.save({"a": grad}, path)
    news = [{"loss": loss, "gradients": str(path)}]
    return Player(Variant(name, "bare"), Namespace(), Namespace(), path, news)  # type: ignore[arg-type]


@pytest.mark.parametrize("leaf", leaves(SIZES["tiny"], "cpu", torch.float64), ids=str)
def test_leaves_and_what_would_be_compiled_instead_are_the_same(leaf: Leaf) -> None:
    found, expected = (way(*(x.clone() for x in leaf.inputs)) for way in (leaf.ours, leaf.plain))
    torch.testing.assert_close(found, expected)
    if leaf.backward:
        grads = [
            torch.autograd.grad(outputs, leaf.inputs, [torch.sin(x) for x in outputs])
            for outputs in (leaf.ours(*leaf.inputs), leaf.plain(*leaf.inputs))
        ]
        torch.testing.assert_close(*grads)
    leaf.run(leaf.ours)
    leaf.run(leaf.plain)


def test_another_loss_or_gradient_is_refused(tmp_path: Path) -> None:
    grad = torch.randn(4, 5)
    peer = player(tmp_path, "peer", 2.0, grad)
    assert "gradients 0.0e+00" in compare(player(tmp_path, "same", 2.0, grad), peer)
    for loss, other in ((2.001, grad), (2.0, grad * 1.001), (float("nan"), grad)):
        with pytest.raises(RuntimeError, match="not those of peer"):
            compare(player(tmp_path, "other", loss, other), peer)


def test_rows_are_the_same_whatever_their_number_and_padding_is_the_collators() -> None:
    size = SIZES["tiny"]
    few, many = rows(size, "skewed", 20), rows(size, "skewed", 40)
    for (ids, trained), (again, trained_again) in zip(few, many, strict=False):
        assert np.array_equal(ids, again) and np.array_equal(trained, trained_again)
    batch = padded(few[6:9])
    lengths = [len(ids) for ids, _ in few[6:9]]
    assert batch["input_ids"].shape[1] == -(-max(lengths) // 8) * 8
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert int((batch["labels"] >= 0).sum()) == sum(int(trained.sum()) for _, trained in few[6:9])


def test_a_weight_follows_from_its_name() -> None:
    like = torch.empty(0)
    first = weight("model.layers.0.mlp.up_proj.weight", (40, 30), like)
    assert torch.equal(first, weight("model.layers.0.mlp.up_proj.weight", (40, 30), like))
    assert not torch.equal(first, weight("model.layers.1.mlp.up_proj.weight", (40, 30), like))


def test_model_flops_of_the_8b_model_are_those_of_the_notes() -> None:
    """31.9 GFLOP per token at length 2048 without LoRA, 0.25 with it."""
    assert SIZES["8b"].model_flops(2048) / 2048 / 1e9 == pytest.approx(31.9 + 0.25, abs=0.05)


def test_ranks_get_work_by_those_flops() -> None:
    for size in SIZES.values():
        shape, lora = size.shape, 6 * size.lora.size(size.shape)
        work = [n + n * n / shape.break_even_length for n in (1, 60, 2048)]
        flops = [size.model_flops(n) - n * lora for n in (1, 60, 2048)]
        assert np.array(work) / work[0] == pytest.approx(np.array(flops) / flops[0])
    # Forward 15.01 GFLOP of products and 0.54 of attention per token at 2048; backward 1 x, 2.5 x.
    share = 2048 / SIZES["8b"].shape.break_even_length
    assert share == pytest.approx(3.5 * 0.54 / (2 * 15.01), rel=0.01)
