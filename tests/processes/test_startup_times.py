"""The times of a start: they follow each other, and the first begins with the process."""

from __future__ import annotations

import time

import psutil

from minilora.processes.startup_times import StartupTimes

# psutil knows when the machine was started to the second only.
ROUNDED = 1.0


def test_the_parts_add_up_to_the_age_of_the_process() -> None:
    times = StartupTimes()
    times.finished("imports")
    born = psutil.Process().create_time()
    before = time.time() - born
    times.finished("checks")
    after = time.time() - born

    assert list(times.seconds) == ["imports", "checks"]
    assert all(seconds >= 0 for seconds in times.seconds.values())
    assert before - ROUNDED <= sum(times.seconds.values()) <= after + ROUNDED


def test_the_line_names_every_part() -> None:
    times = StartupTimes()
    times.finished("imports")
    times.finished("DeepSpeed")
    imports, deepspeed = times.seconds.values()
    assert str(times) == (
        f"{imports + deepspeed:.1f} s since the launch: "
        f"imports {imports:.1f}, DeepSpeed {deepspeed:.1f}"
    )
