"""Memory runs out in each phase of a run of two ranks: advice is given, and every rank ends."""

from __future__ import annotations

import re

import pytest

from tests.support.fault_cases import Results, case, fault, run_cases
from tests.support.runs import Ground

# Phase in which memory runs out -> the moment of tests/support/faults.py.
FULL = {"gather": "gather", "forward": "forward", "loss": "loss", "recompute": "recompute",
        "step": "adam", "save": "reading the adapter"}  # fmt: skip


@pytest.fixture(scope="module")
def results(ground: Ground) -> Results:
    """An allocation of rank 1 fails; in the loss, of both ranks."""
    small = {"tile_tokens": 100, "loss_tokens": 200, "gradient_accumulation_steps": 3}
    listed = [
        case(ground, f"no memory {phase}",
             fault(at, "allocate", (0, 1) if phase == "loss" else (1,)), **small)
        for phase, at in FULL.items()
    ]  # fmt: skip
    return run_cases(listed, ground.folder / "out-of-memory.json")


@pytest.mark.parametrize("phase", FULL)
def test_out_of_memory_gives_advice_and_ends_all_ranks(phase: str, results: Results) -> None:
    result = results[f"no memory {phase}"]
    assert result["codes"] == [1, 1], result
    assert max(result["seconds"]) < 30
    first = "0" if phase == "loss" else "1"
    (said,) = re.findall(
        rf"^error: rank (\d): out of memory, phase {phase}: .*can't allocate memory.*there is no "
        r"snapshot.*\n  the plan said (\S+) GiB of tensors in this phase, (\S+) GiB at the fullest"
        r", of (\S+)\n((?:  \d\. .* saves .* GiB.*, costs .*\n){3})",
        "\n".join(result["outputs"]),
        re.MULTILINE,
    )
    rank, there, most, limit, changes = said
    assert rank == first and float(there) <= float(most) < float(limit)
    savings = [float(x) for x in re.findall(r"saves (\S+) GiB, costs", changes)]
    assert savings == sorted(savings, reverse=True)
    assert savings or phase in ("step", "save")
