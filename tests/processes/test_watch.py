"""What is seen of another process: that it runs, is stopped, or has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from minilora.processes.watch import _fate


@pytest.mark.slow
def test_the_fate_of_a_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    pid = process.pid
    try:
        assert _fate(pid) == ""

        process.send_signal(signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        assert _fate(pid) == f"(process {pid}) is stopped"

        process.send_signal(signal.SIGCONT)
        os.waitpid(pid, os.WCONTINUED)
        assert _fate(pid) == ""

        process.kill()
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # its parent has not asked for it yet
        assert _fate(pid) == f"(process {pid}) has ended"
    finally:
        process.kill()
        process.wait()
    assert _fate(pid) == f"(process {pid}) has ended"
