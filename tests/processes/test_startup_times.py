"""The times of a start: they follow each other, and the first begins with the process."""

from __future__ import annotations

import time

import psutil
import pytest

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


def test_the_line_names_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    times = StartupTimes()
    ages = iter((2.04, 5.5))
    monkeypatch.setattr("minilora.processes.startup_times._age", lambda: next(ages))
    times.finished("imports")
    times.finished("DeepSpeed")
    assert str(times) == "5.5 s since the launch: imports 2.0, DeepSpeed 3.5"
