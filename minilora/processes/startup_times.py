"""Seconds of the start, by phase."""

from __future__ import annotations

import os
import time
from pathlib import Path


class StartupTimes:
    """Seconds of each phase, one after another, the first from the start of the process on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = 0.0

    def done(self, phase: str) -> None:
        """The end of a phase is now."""
        now = _age()
        self.seconds[phase], self._last = now - self._last, now

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"{self._last:.1f} s since the launch: {phases}"


def _age() -> float:
    """Seconds since this process started, Python's own start included."""
    # proc_pid_stat(5): field 22, counted in clock ticks since boot; names may have spaces.
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
