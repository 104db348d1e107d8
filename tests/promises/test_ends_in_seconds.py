"""What may happen to a run: it ends in seconds, says why, and what was saved stays whole."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.data.tokenizer_files import read_tokenizer_files
from minilora.files.adapter import WEIGHTS, write_adapter
from minilora.files.model_config import read_model_config
from minilora.files.output_folder import LOCK, is_claimed
from minilora.files.snapshot import (
    PREFIX,
    find_snapshot,
    read_state,
    read_tensors,
)
from minilora.files.weights import INDEX
from minilora.model.lora_shape import LoraShape
from minilora.report.run_log import RESULTS
from minilora.training.engine import MOMENTS
from tests.support.fault_cases import Results, case, fault, run_cases
from tests.support.processes import Launch
from tests.support.runs import Ground, stage_file

# ddp_timeout of the cases that wait for it: longer than ranks of a busy machine keep each other
# waiting.
PATIENCE = 20

# In so many seconds after a fault all ranks have ended, also on a busy machine. A rank that nobody
# ends would take ddp_timeout, half an hour, or sleep for SLEEP seconds.
SECONDS = 300
SLEEP = 600


def great_adapter(ground: Ground) -> Path:
    """A start whose outputs are the base's, for B is zero, and whose gradients overflow."""
    folder = ground.folder / "great"
    shape = read_model_config(ground.models["tiny"]).shape
    lora = LoraShape(4, 4 * 10**9, 0.0, ("q_proj",))
    shapes = lora.parameter_shapes(shape)
    tensors = {name: torch.full(size, 1e35 * name.endswith("A")) for name, size in shapes.items()}
    write_adapter(folder, tensors, lora, read_tokenizer_files(ground.models["tiny"]))
    return folder


def broken_base(ground: Ground) -> Path:
    """A copy of the base whose last weight is NaN: the second of two ranks reads it."""
    name = "lm_head.weight"
    folder = Path(shutil.copytree(ground.models["tiny"], ground.folder / "broken-base"))
    file = folder / json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"][name]
    tensors = load_file(file)
    tensors[name][-1, -1] = torch.nan
    save_file(tensors, file)
    return folder


def untied_base(ground: Ground) -> Path:
    """A copy of the tied base whose files hold another head than the embedding."""
    folder = Path(shutil.copytree(ground.models["tiny_tied"], ground.folder / "untied-base"))
    path = folder / INDEX
    index = json.loads(path.read_text(encoding="utf-8"))
    file = folder / index["weight_map"]["model.embed_tokens.weight"]
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    index["weight_map"]["lm_head.weight"] = file.name
    path.write_text(json.dumps(index), encoding="utf-8")
    return folder


def cases(ground: Ground, tmpfs: Callable[[str], Path | None]) -> list[dict[str, Any]]:
    impatient = {"ddp_timeout": PATIENCE}
    great = {"adapter_name_or_path": str(great_adapter(ground)), "warmup_steps": 0}
    stage0 = {"deepspeed": str(stage_file(ground.folder, 0)), "ranks": 1}
    slow = {**impatient, "save_steps": 6, "link_seconds": PATIENCE}
    found = [  # first those that wait longest
        case(ground, "slow start", fault("tokenising", f"sleep {PATIENCE + 2}"), **slow),
        case(ground, "slow save", fault("save", f"sleep {PATIENCE + 2}"), **slow),
        case(ground, "hanging", fault("step", f"sleep {SLEEP}", (1,), 4), **impatient),
        case(ground, "killed", fault("step", "SIGKILL", (1,), 4), ranks=3),
        case(ground, "first killed", fault("step", "SIGKILL", (0,), 4)),
        case(ground, "killed loading", fault("loading", "SIGKILL", (1,)), ranks=3),
        case(ground, "raising", fault("step", "raise", (1,), 4)),
        case(ground, "stopped", fault("step", "SIGSTOP", (1,), 4), **impatient),
        case(ground, "stopped saving", fault("save", "SIGSTOP", (0,), 2), **impatient),
        case(ground, "share", fault("links", "share"), save_total_limit=1),
        case(ground, "no link", fault("links", f"sleep {SLEEP}", (1,)), link_seconds=2),
        case(ground, "asked", fault("step", "echo; SIGTERM", (1,), 3)),
        case(ground, "first asked", fault("loading", "SIGTERM", (0,))),
        case(ground, "asked early", fault("tokenising", "SIGINT"), ranks=1),
        case(ground, "asked loading", fault("loading", "SIGTERM", (0, 1))),
        case(ground, "asked twice", fault("step", "SIGTERM", (0,), 3),
             fault("file of a save", "SIGTERM", (0,), 4)),
        case(ground, "moved", fault("log", "move", (0,), 4), ranks=1),
        case(ground, "in use", claimed=True, ranks=1),
        case(ground, "snapshot spoilt", fault("check", "flip", count=2), **stage0),
        case(ground, "adapter spoilt", fault("check", "flip"), save_strategy="no", **stage0),
        case(ground, "still", adapter_name_or_path="null", learning_rate=1e-300, max_steps=1,
             warmup_steps=0, save_strategy="no", **stage0),
        case(ground, "rate", learning_rate=1e30, warmup_steps=0, lr_scheduler_type="constant"),
        case(ground, "gradient", **great),
        case(ground, "gradient alone", **great, **stage0),
        case(ground, "base", model_name_or_path=str(broken_base(ground))),
        case(ground, "untied", model_name_or_path=str(untied_base(ground)),
             adapter_name_or_path=str(ground.adapters["tiny_tied"])),
    ]  # fmt: skip
    for name, do in (("full", "fill"), ("read-only", "read-only")):
        if folder := tmpfs("4m"):
            output = {"output_dir": str(folder / "out")}
            found.append(case(ground, name, fault("save", do, (0,), 2), **output))
    if folder := tmpfs("4m"):
        output = {"output_dir": str(folder / "out")}
        found.append(case(ground, "full at the end", fault("results", "fill"), **output))
    return found


@pytest.fixture(scope="session")
def results(ground: Ground, tmpfs: Callable[[str], Path | None], launch: Launch) -> Results:
    return run_cases(launch, cases(ground, tmpfs), ground.folder / "faults.json")


# Case -> exit code of each rank, words of the one message, and the snapshot that must be whole.
ENDS: dict[str, tuple[list[int], str, int | None]] = {
    "killed": ([1, -9, 1], "rank 1 (process # ) has ended; the last snapshot is", 2),
    "first killed": ([-9, 1], "rank 0 (process # ) has ended; the last snapshot is", 2),
    "killed loading": ([1, -9, 1], "rank 1 (process # ) has ended; there is no snapshot", None),
    "raising": ([1, 1], "rank 1 (process # ) has ended; the last snapshot is", 2),
    "stopped": ([1, -9], "rank 1 (process # ) is stopped; the last snapshot is", 2),
    "stopped saving": ([-9, 1], "rank 0 (process # ) is stopped; the last", 2),
    "hanging": ([1, 1], f"the ranks lost touch: Timed out waiting {PATIENCE}000ms", 2),
    "no link": ([1, 1], "could not add up 1 MB in 2 s: on GPUs without peer-to-peer (RTX 4090)"
                " set NCCL_P2P_DISABLE=1", None),
    "asked": ([143, 143], "SIGTERM: stopped after step 4; the last snapshot is", 4),
    "asked early": ([130], "SIGINT: stopped outside the steps; there is no snapshot", None),
    "asked loading": ([143, 143], "SIGTERM: stopped outside the steps; there is no", None),
    "first asked": ([143, 1], "SIGTERM: stopped outside the steps; there is no", None),
    "asked twice": ([-15, 1], "rank 0 (process # ) has ended; the last snapshot is", 2),
    "moved": ([1], "trainer_log.jsonl cannot be written: No such file or directory", None),
    "snapshot spoilt": ([1], "checkpoint-4/adapter_model.safetensors: base_model.model.", None),
    "adapter spoilt": ([1], "adapter_model.safetensors: base_model.model.", None),
    "still": ([1], "14 of the adapter's matrices never moved from zero, model.", None),
    "full": ([1, 1], "/out cannot be written: No space left on device; the last", 2),
    "read-only": ([1, 1], "cannot be written: Read-only file system", 2),
}  # fmt: skip


def only_message(result: dict[str, Any]) -> str:
    """The one line that all ranks together say about the end, process numbers as #."""
    lines = "\n".join(result["outputs"]).splitlines()
    (message,) = [line for line in lines if line.startswith("error: ")]
    return re.sub(r"process \d+", "process # ", message)


def check_whole(folder: Path) -> None:
    """A snapshot can be read: where it stood, every tensor, and its adapter."""
    assert read_state(folder).step == int(folder.name.removeprefix(PREFIX))
    named = {name.removeprefix("base_model.model.").removesuffix(".weight"): tensor
             for name, tensor in load_file(folder / WEIGHTS).items()}  # fmt: skip
    shapes = {f"{name}{end}": tuple(tensor.shape) for name, tensor in named.items()
              for end in ("", *(f".{moment}" for moment in MOMENTS))}  # fmt: skip
    tensors = read_tensors(folder, shapes)
    assert tensors.keys() == shapes.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in named.items())


@pytest.mark.parametrize("name", ENDS)
def test_a_fault_ends_the_run_in_seconds_and_is_named(name: str, results: Results) -> None:
    codes, words, step = ENDS[name]
    if name not in results:
        pytest.skip("mounting a file system needs root")
    result = results[name]
    assert result["codes"] == codes, result
    if name != "still":  # nothing is injected there, from which seconds would count
        assert max(result["seconds"]) < SECONDS
    assert words in only_message(result)
    assert ("Traceback" in "".join(result["outputs"])) == (name == "raising")
    assert not result["left"], "tokens of a run that is over"
    if step is not None:
        output = Path(result["job"]["output_dir"])
        if name == "read-only":
            subprocess.run(["umount", str(output)], check=True)
        assert find_snapshot(output, "true") == output / f"{PREFIX}{step}"
        check_whole(output / f"{PREFIX}{step}")


def test_a_failing_rank_shows_its_own_mistake(results: Results) -> None:
    first, second = results["raising"]["outputs"]
    assert "ValueError: made by the test" in second and "ValueError" not in first


def test_a_moved_folder_keeps_its_snapshot(results: Results) -> None:
    check_whole(Path(results["moved"]["job"]["output_dir"] + "-away") / f"{PREFIX}2")


@pytest.mark.parametrize("name", ["slow start", "slow save"])
def test_slow_work_of_one_rank_trips_no_timeout(name: str, results: Results) -> None:
    result = results[name]
    assert result["codes"] == [0, 0], result
    check_whole(Path(result["job"]["output_dir"]) / f"{PREFIX}6")


def test_a_network_share_costs_one_warning_and_no_bit(results: Results) -> None:
    """No locks, no flushing of folders, folders that are busy or gone when they are deleted."""
    result = results["share"]
    assert result["codes"] == [0, 0], result
    output = Path(result["job"]["output_dir"])
    warnings = [line for line in result["outputs"][0].splitlines() if "warning: " in line]
    assert len(warnings) == 1 and f"{output} cannot be flushed to the disk" in warnings[0]
    sound = Path(results["slow save"]["job"]["output_dir"])
    assert (output / WEIGHTS).read_bytes() == (sound / WEIGHTS).read_bytes()
    assert find_snapshot(output, "true") == output / f"{PREFIX}6"
    check_whole(output / f"{PREFIX}6")


def test_a_disk_that_is_full_at_the_end_costs_the_results_and_not_the_adapter(
    results: Results,
) -> None:
    if "full at the end" not in results:
        pytest.skip("mounting a file system needs root")
    result = results["full at the end"]
    assert result["codes"] == [0, 0], result
    output = Path(result["job"]["output_dir"])
    text = result["outputs"][0]
    assert f"warning: {output / RESULTS} is not written: No space left on device" in text
    assert "Traceback" not in "".join(result["outputs"])
    assert not (output / RESULTS).exists(), "no half of it"
    sound = Path(results["slow save"]["job"]["output_dir"])
    assert (output / WEIGHTS).read_bytes() == (sound / WEIGHTS).read_bytes()


def test_a_loss_that_is_not_finite_stops_before_the_update(results: Results) -> None:
    result = results["rate"]
    assert result["codes"] == [1, 1]
    found = re.search(r"error: step 2: the loss is (nan|inf) on rank (\d), which had the rows "
                      r"\[(.*?)\]; nothing was updated", only_message(result))  # fmt: skip
    assert found and found[2] in "01"
    assert len(found[3].split(", ")) == 4
    assert not list(Path(result["job"]["output_dir"]).glob(f"{PREFIX}*"))


@pytest.mark.parametrize("name", ["gradient", "gradient alone"])
def test_a_gradient_that_is_not_finite_stops_before_the_update(name: str, results: Results) -> None:
    result = results[name]
    assert set(result["codes"]) == {1}
    assert re.match(r"error: step 1: the gradient's norm is (nan|inf); nothing was updated",
                    only_message(result))  # fmt: skip


def test_a_weight_that_is_not_finite_is_named_though_another_rank_reads_it(
    results: Results,
) -> None:
    result = results["base"]
    assert result["codes"] == [2, 2]
    assert ".safetensors: lm_head.weight holds NaN or infinite weights" in only_message(result)


def test_a_head_that_is_tied_and_differs_is_refused_by_all_ranks(results: Results) -> None:
    assert results["untied"]["codes"] == [2, 2]
    assert "lm_head.weight differs from model.embed_tokens" in only_message(results["untied"])


def test_two_runs_never_share_a_folder(results: Results) -> None:
    result = results["in use"]
    assert result["codes"] == [2]
    assert re.search(r"is in use by process # +on .*; name another folder", only_message(result))


def test_only_a_run_that_ends_in_good_order_leaves_no_lock(results: Results) -> None:
    for name, killed in (("slow save", False), ("asked", False), ("first killed", True)):
        output = Path(results[name]["job"]["output_dir"])
        assert (output / LOCK).exists() == is_claimed(output) == killed, name
