"""Memory runs out at each moment of a run of two ranks: advice is given, and every rank ends."""

from __future__ import annotations

import re

import pytest

from tests.support.fault_cases import Results, case, fault, run_cases
from tests.support.processes import Launch
from tests.support.runs import Ground

# Moments of the memory plan -> before what tests/support/faults.py puts the fault.
FAULT_BEFORE = {
    "gather": "gather",
    "forward": "forward",
    "loss": "loss",
    "recompute": "recompute",
    "step": "adam",
    "save": "reading the adapter",
}


@pytest.fixture(scope="module")
def results(ground: Ground, launch: Launch) -> Results:
    """An allocation of rank 1 fails; in the loss, of both ranks."""
    small = {"tile_tokens": 100, "loss_tokens": 200, "gradient_accumulation_steps": 3}
    listed = []
    for moment, place in FAULT_BEFORE.items():
        ranks = (0, 1) if moment == "loss" else (1,)
        listed.append(case(ground, f"no memory {moment}", fault(place, "allocate", ranks), **small))
    return run_cases(launch, listed, ground.folder / "out-of-memory.json")


@pytest.mark.parametrize("moment", FAULT_BEFORE)
def test_out_of_memory_gives_advice_and_ends_all_ranks(moment: str, results: Results) -> None:
    result = results[f"no memory {moment}"]
    assert result["codes"] == [1, 1], result
    assert max(result["seconds"]) < 120, "the other rank does not wait for ddp_timeout"
    first = "0" if moment == "loss" else "1"
    (said,) = re.findall(
        rf"^error: rank (\d): out of memory \(moment: {moment}\): .*can't allocate memory.*there "
        r"is no snapshot.*\n  the plan said (\S+) GiB of tensors at this moment, (\S+) GiB at the "
        r"peak; there are (\S+) GiB\n((?:  \d\. .* saves .* GiB.*, costs .*\n){3})",
        "\n".join(result["outputs"]),
        re.MULTILINE,
    )
    rank, there, most, limit, changes = said
    assert rank == first and float(there) <= float(most) < float(limit)
    savings = [float(x) for x in re.findall(r"saves (\S+) GiB, costs", changes)]
    assert savings == sorted(savings, reverse=True)
    assert savings or moment in ("step", "save")
