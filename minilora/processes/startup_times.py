"""How long each part of the start of a run took."""

from __future__ import annotations

import os
import time
from pathlib import Path


class StartupTimes:
    """Seconds of each part of the start, one after another; the first begins with the process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last_end = 0.0

    def finished(self, part: str) -> None:
        """Note that a part ends now: `times.finished("imports")`."""
        now = _age()
        self.seconds[part] = now - self._last_end
        self._last_end = now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"{self._last_end:.1f} s since the launch: {parts}"


def _age() -> float:
    """Seconds since this process started, Python's own start included."""
    # Not psutil's create_time: it adds a boot time that the kernel gives in whole seconds.
    # proc_pid_stat(5): field 22 is the start in clock ticks since boot. Field 2 is the name, which
    # may hold spaces, so count from the bracket after it; field 3 comes first there.
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    started = int(fields[22 - 3]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
