"""How tests start real processes, and the smallest checkpoint they run on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

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
    if launcher == "forked":
        assert arguments[0] == "-m", "it starts a module"
        return [sys.executable, "-m", "tests.support.forked", str(world_size), *arguments[1:]]
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
