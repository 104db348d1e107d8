"""Several machines: the result is one machine's, or the run is refused, or it ends in seconds.

Ranks that are forked with the words of two launchers stand for machines, and SIGSTOP for a cable
that is cut. tests/support/namespaces.sh makes two networks instead, where root may.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.files.snapshot import PREFIX, find_snapshot
from minilora.files.weights import INDEX
from minilora.processes.machines import Process, machines_of
from minilora.report.curves import LOG, read_log
from tests.support.fault_cases import Results, fault, run_cases
from tests.support.machines import jobs_case, launch_two, machine_case, sound_jobs
from tests.support.processes import Launch
from tests.support.runs import Ground, adapter, stage_file

# A machine that says nothing is lost after 12 s, and then all processes end: 17 s were seen. In so
# many seconds they have ended on a busy machine too. Without the signs of life it would be half an
# hour.
SECONDS = 100
# Ends of the names of machines, which all have that of this computer.
ZERO, ONE = r"\S+ \(machine 0\)", r"\S+ \(machine 1\)"


def other_weights(ground: Ground) -> Path:
    """A copy of the base in which one row of one matrix is another."""
    name = "model.layers.1.mlp.up_proj.weight"
    folder = Path(shutil.copytree(ground.models["tiny"], ground.folder / "other-row"))
    file = folder / json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"][name]
    tensors = load_file(file)
    tensors[name][3] *= 1.01  # with ZeRO-3 no rank of machine 1 loads this row
    save_file(tensors, file)
    return folder


def cases(ground: Ground) -> list[dict[str, Any]]:
    rows = ground.folder / "machine-rows.jsonl"
    rows.write_text(ground.data.read_text("utf-8").replace("brief", "short"), "utf-8")
    rates = {"learning_rate": 1e-3, "max_steps": 5}
    missing = {"model_name_or_path": "/nowhere/model"}
    return [
        machine_case(ground, "machine stopped", fault("step", "SIGSTOP", (1,), 4)),
        machine_case(ground, "first stopped", fault("step", "SIGSTOP", (0,), 4)),
        machine_case(ground, "neighbour killed", fault("step", "SIGKILL", (2,), 4),
                     machines=[[0], [1, 2]]),
        machine_case(ground, "machine killed", fault("step", "SIGKILL", (1,), 4)),
        machine_case(ground, "rank 0 killed", fault("step", "SIGKILL", (0,), 4),
                     machines=[[0, 1], [2]]),
        machine_case(ground, "no memory", fault("forward", "allocate", (1,), 20)),
        machine_case(ground, "asked loading there", fault("loading", "SIGTERM", (1,))),
        machine_case(ground, "never there", absent=[1], ddp_timeout=2),
        machine_case(ground, "other settings", fault("start", "age", (1,)), own=rates),
        machine_case(ground, "other rows", own={"dataset": str(rows)}),
        machine_case(ground, "other row", own={"model_name_or_path": str(other_weights(ground))}),
        machine_case(ground, "no model", own=missing),
        machine_case(ground, "no such key", own={"lerning_rate": 1}),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def ended(ground: Ground, launch: Launch) -> Results:
    return run_cases(launch, cases(ground), ground.folder / "machines.json")


@pytest.fixture(scope="session")
def sound(ground: Ground, launch: Launch) -> Results:
    listed = [
        jobs_case(ground, "whole", [[0, 1, 2]]),
        jobs_case(ground, "parted", [[0], [1, 2]]),
    ]
    return run_cases(launch, listed, ground.folder / "sound.json")


# Case -> exit code of each rank, and all that is said about the end, by rank.
HEARD = "nothing was heard of"
ON_0 = f"the last snapshot is .*/checkpoint-2 on {ZERO}: --resume"
ENDS: dict[str, tuple[list[int], dict[int, str]]] = {
    "machine stopped": ([1, -9], {0: rf"{HEARD} {ONE} \(rank 1\) for 1[2-9] s: .*; {ON_0}"}),
    "first stopped": ([-9, 1], {1: rf"{HEARD} {ZERO} \(rank 0\) for 1[2-9] s: .*; {ON_0}"}),
    "neighbour killed": ([1, 1, -9], {0: rf"{ONE}: rank 2 \(process #\) has ended; {ON_0}"}),
    "machine killed": ([1, -9], {0: rf"{HEARD} {ONE} \(rank 1\) for [4-9] s: .*; {ON_0}"}),
    "rank 0 killed": (
        [-9, 1, 1],
        {
            1: rf"{ZERO}: rank 0 \(process #\) has ended; {ON_0}",
            # The board went with rank 0, so machine 1 speaks for itself.
            2: rf"{HEARD} {ZERO} \(ranks 0, 1\) for [4-9] s: .*; {ON_0}",
        },
    ),
    "no memory": (
        [1, 1],
        {
            0: rf"{ONE}: rank 1: out of memory \(moment: \w+\): .*; {ON_0}",
            1: rf"rank 1: out of memory \(moment: \w+\): .*; {ON_0}",
        },
    ),
    "asked loading there": (
        [1, 143],
        {0: rf"{ONE}: SIGTERM: stopped outside the steps; there is no snapshot"},
    ),
    "never there": ([1, 0], {0: r"1 of 2 processes came to 127.0.0.1:\d+, from \S+; ranks 1 did"}),
}


def said(result: dict[str, Any]) -> dict[int, list[str]]:
    """What each rank said about the end, process numbers as #."""
    lines = {
        rank: [re.sub(r"process \d+", "process #", line) for line in text.splitlines()
               if line.startswith("error: ")]
        for rank, text in enumerate(result["outputs"])
    }  # fmt: skip
    return {rank: found for rank, found in lines.items() if found}


@pytest.mark.parametrize("name", ENDS)
def test_a_lost_machine_ends_the_run_and_is_named(name: str, ended: Results) -> None:
    codes, words = ENDS[name]
    result = ended[name]
    assert result["codes"] == codes, result
    assert said(result).keys() == words.keys(), result
    for rank, lines in said(result).items():
        assert len(lines) == 1 and re.match(f"error: {words[rank]}", lines[0]), lines
    everything = "".join(result["outputs"])
    assert "Traceback" not in everything and "GLHF" not in everything
    assert not result["left"], "tokens of a run that is over"
    if name != "never there":
        assert max(result["seconds"]) < SECONDS
    if any(ON_0 in pattern for pattern in words.values()):
        output = Path(result["job"]["output_dir"])
        assert find_snapshot(output, "true") == output / f"{PREFIX}2"


# Case -> what every line says that rank 0 alone prints.
REFUSED = {
    "other settings": [
        rf"the version of minilora is '0.0' on {ONE}, and '.*' on {ZERO}; give all machines the",
        rf"max_steps is 5 on {ONE}, and 6 on {ZERO}; give all machines the same settings",
        rf"learning_rate is 0.001 on {ONE}, and 0.0002 on {ZERO}; give all machines the same",
    ],
    "other rows": [
        rf"the training documents are not the same on {ONE} as on {ZERO}; copy the data",
        rf"the file of dataset 1 is not the same on {ONE} as on {ZERO}; copy the data",
    ],
    "other row": [
        rf"model_name_or_path: model.layers.1.mlp.up_proj.weight on {ONE} differs from {ZERO}'s",
    ],
    "no model": [rf"{ONE}: model_name_or_path: /nowhere/model: no such folder"],
    "no such key": [rf"{ONE}: lerning_rate \(command line\) is not a known key: did you mean lea"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_machines_that_differ_are_refused_by_name(name: str, ended: Results) -> None:
    result = ended[name]
    assert result["codes"] == [2, 2], result
    lines = said(result)
    assert lines.keys() == {0} and len(lines[0]) == len(REFUSED[name]), result
    for pattern in REFUSED[name]:
        assert any(re.match(f"error: {pattern}", line) for line in lines[0]), lines
    assert "Traceback" not in "".join(result["outputs"])


def figures(job: dict[str, Any], key: str) -> list[float]:
    """A figure from all lines of the log that have it: steps and validations have others."""
    lines = read_log(Path(job["output_dir"]) / LOG)
    return [line[key] for line in lines if key in line]


@pytest.mark.parametrize(
    "name", ["ZeRO-3", "ZeRO-2", "ZeRO-0, DoRA", "ZeRO-3, DoRA, 4 bits", "resumed"]
)
def test_two_machines_give_the_bits_of_one(name: str, ground: Ground, sound: Results) -> None:
    """1 + 2 ranks, and machine 1 has neither the output folder nor the snapshots."""
    assert all(set(sound[case]["codes"]) == {0} for case in sound), sound
    whole, parted = (
        sound_jobs(ground, ground.folder / f"{case}-0")[name] for case in ("whole", "parted")
    )
    for key in ("loss", "grad_norm", "eval_loss"):
        assert figures(parted, key) == figures(whole, key)
    expected = adapter(whole)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in adapter(parted).items())
    if name == "resumed":
        start = sound_jobs(ground, ground.folder / "parted-0")["ZeRO-3"]
        assert figures(parted, "loss") == figures(start, "loss")[2:]
        assert all(torch.equal(tensor, expected[key]) for key, tensor in adapter(start).items())
    assert not (ground.folder / "parted-1").exists()


@pytest.mark.parametrize(("launcher", "counts"), [("torchrun", [1, 1]), ("deepspeed", [1, 2])])
def test_both_launchers_start_several_machines(
    launcher: str, counts: list[int], ground: Ground, tmp_path: Path
) -> None:
    """deepspeed with unequal slots: its LOCAL_RANK is then no place in the order of the ranks."""
    settings = {"max_steps": 2, "deepspeed": str(stage_file(ground.folder, 3)),
                "save_strategy": "no", "per_device_train_batch_size": 2}  # fmt: skip
    job = ground.job(f"launched-{launcher}", "tiny", **settings)
    ends = launch_two(launcher, counts, job, tmp_path)
    assert [code for code, _ in ends] == [0, 0], ends
    assert len(figures({"output_dir": f"{job['output_dir']}-0"}, "loss")) == 2
    first, second = (output for _, output in ends)
    assert f"ZeRO-3 on {sum(counts)} x cpu" in first and "ZeRO-3" not in second
    assert first.count("the adapter is in") == first.count("\nplan: ") == 1
    assert not Path(f"{job['output_dir']}-1").exists()


def test_machines_are_told_apart() -> None:
    def process(place: str, node: str, host: str) -> Process:
        return Process(place, 1, host, node, "")

    parted = machines_of([process("a", "0", "x"), process("b", "1", "y"), process("b", "1", "y")])
    assert [str(machine) for machine in parted] == ["x (rank 0)", "y (ranks 1, 2)"]
    same = machines_of([process("a", "0", "x"), process("a", "1", "x")])
    assert [machine.name for machine in same] == ["x (machine 0)", "x (machine 1)"]
    unnumbered = machines_of([process("a", "", "x"), process("a", "", "x")])
    assert [machine.ranks for machine in unnumbered] == [(0, 1)]
