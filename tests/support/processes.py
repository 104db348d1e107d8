"""How tests start real processes, and the smallest checkpoint they run on."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from dataclasses import replace

from minilora.tiny.checkpoint import TinyShape

SMALL = TinyShape(
    hidden=32, intermediate=64, layers=2, head_dim=8, dtype="float32", shard_bytes=60_000
)


# The smallest whose weights can be packed to 4 bits: every row is of whole blocks of 64.
PACKABLE = replace(SMALL, hidden=64, intermediate=128, head_dim=16, shard_bytes=200_000)

Launch = Callable[..., tuple[int, str]]


def free_port() -> int:
    """A TCP port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command_line(launcher: str, world_size: int, arguments: list[str]) -> list[str]:
    """How a launcher starts a script, or -m and a module, on this many ranks."""
    if launcher == "python":
        assert world_size == 1, "python starts one process"
        return [sys.executable, *arguments]
    port = free_port()
    if launcher == "deepspeed":
        if arguments[0] == "-m":
            arguments = ["--module", *arguments[1:]]
        runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
        return [*runner, f"--num_gpus={world_size}", f"--master_port={port}", *arguments]
    assert launcher == "torchrun", launcher
    runner = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world_size}"]
    return [*runner, f"--master-port={port}", *arguments]
