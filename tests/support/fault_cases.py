"""Training runs to which something happens: how they are described, started and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.processes import Launch
from tests.support.runs import Ground, stage_file

Results = dict[str, dict[str, Any]]


def fault(at: str, do: str, ranks: tuple[int, ...] = (0,), count: int = 1) -> dict[str, Any]:
    return {"at": at, "do": do.split("; "), "ranks": ranks, "count": count}


def case(ground: Ground, name: str, *faults: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run of 6 steps with a snapshot after every second one.

    machines: the ranks of each, where there are several; own: settings of some of them, by number;
    absent: ranks that end before they have done anything
    """
    keys = ("ranks", "link_seconds", "claimed", "machines", "own", "absent")
    settings = {key: changes.pop(key) for key in keys if key in changes}
    job = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4,
           "deepspeed": str(stage_file(ground.folder, 3)), **changes}  # fmt: skip
    job = ground.job(f"fault-{name.replace(' ', '-')}", "tiny", **job)
    return {"name": name, "ranks": 2, "job": job, "faults": faults, **settings}


def run_cases(launch: Launch, listed: list[dict[str, Any]], path: Path) -> Results:
    path.write_text(json.dumps(listed), encoding="utf-8")
    code, output = launch(1, ["-m", "tests.support.faults", path], with_="alone")
    assert code == 0, output
    found = {line["name"]: line for line in map(json.loads, output.splitlines())}
    for one in listed:
        found[one["name"]]["job"] = one["job"]
    return found
