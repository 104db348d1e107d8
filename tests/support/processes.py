"""How tests start real processes, and the smallest checkpoint they run on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from minilora.processes.ports import free_port
from minilora.tiny.checkpoint import TinyShape

SMALL = TinyShape(
    hidden=32, intermediate=64, layers=2, head_dim=8, dtype="float32", shard_bytes=60_000
)


# The smallest whose weights can be packed to 4 bits: every row is of whole blocks of 64.
PACKABLE = replace(SMALL, hidden=64, intermediate=128, head_dim=16, shard_bytes=200_000)
# How long a process that hangs is waited for, however busy the machine is.
HANGING_SECONDS = 1800

Launch = Callable[..., tuple[int, str]]


def command_line(launcher: str, world_size: int, arguments: list[str]) -> list[str]:
    """How a launcher starts a script, or -m and a module, on this many ranks."""
    if launcher == "python":
        assert world_size == 1, "python starts one process"
        return [sys.executable, *arguments]
    if launcher == "minilora":
        assert arguments[:2] == ["-m", "minilora.train"], "it starts nothing else"
        command = [sys.executable, "-m", "minilora", "train", f"--num_gpus={world_size}"]
        return [*command, *arguments[2:]]
    port = free_port()
    if launcher == "deepspeed":
        if arguments[0] == "-m":
            arguments = ["--module", *arguments[1:]]
        runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
        return [*runner, f"--num_gpus={world_size}", f"--master_port={port}", *arguments]
    assert launcher == "torchrun", launcher
    runner = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world_size}"]
    return [*runner, f"--master-port={port}", *arguments]


def run_command(
    command: list[str], environment: dict[str, str], output: Path, timeout: float
) -> int | None:
    """Run a command, which prints to a file; returns its exit code, or None if it had to be killed.

    What it started is killed with it.
    """
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None
