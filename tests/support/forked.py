"""Processes of the tests, forked from one that has imported torch and DeepSpeed.

Those imports take each new interpreter about five seconds of CPU time. Python's fork server has
them once for each worker of pytest, and forks from there what the tests start: processes like a
launcher's, with the same environment variables, joined over gloo in the same way. Only the imports
are shared. What needs a real launcher or a new interpreter (its signals, its words, what it
imports) is tested with one.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

from minilora.processes.ports import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
IMPORTED = "tests.support.imported"


@dataclass(frozen=True)
class Places:
    """The ranks that start: so many on each of so many machines, as their environment says."""

    ranks: int
    machines: int = 1


@cache
def fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([IMPORTED])
    # It finds modules in the folder where it starts, and is silent about those that it misses.
    folder = os.getcwd()
    os.chdir(ROOT)
    forkserver.ensure_running()
    os.chdir(folder)
    return context


def run_forked(
    words: Sequence[str],
    places: Places | None,
    environment: dict[str, str],
    output: Path,
    timeout: float,
) -> int | None:
    """Run -m, a module and its arguments on these ranks, or in one process without a launcher.

    All that they print goes to the file `output`. Returns the exit code, or None if the processes
    had to be killed.
    """
    assert words[0] == "-m", "it starts a module"
    told = (words[1], list(words[2:]), places, environment, os.getcwd(), output)
    process = fork_server().Process(target=_begin, args=told)
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        os.killpg(process.pid or 0, signal.SIGKILL)
    return process.exitcode


def _begin(
    module: str,
    arguments: list[str],
    places: Places | None,
    environment: dict[str, str],
    folder: str,
    output: Path,
) -> None:
    assert IMPORTED in sys.modules, "the fork server has not imported what its processes share"
    os.setsid()
    handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    if places is None:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.exit(_run_ranks(module, places))


def _run_ranks(module: str, places: Places) -> int:
    """As under a launcher, the failure of one rank ends the others, and its exit code is ours."""
    here, ranks = places.ranks, places.ranks * places.machines
    os.environ |= launchers_words(ranks, here, free_port())
    running = {fork_rank(rank, rank % here, module) for rank in range(ranks)}
    failure = 0
    while running:
        ended, status = os.wait()
        running.discard(ended)
        if status and not failure:
            failure = os.waitstatus_to_exitcode(status)
            for process in running:
                os.kill(process, signal.SIGKILL)
    return failure


def launchers_words(ranks: int, here: int, port: int) -> dict[str, str]:
    """What a launcher tells all ranks that it starts: so many in all, and on this machine."""
    return {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(here),
        "LOCAL_SIZE": str(here),  # else DeepSpeed starts numactl in every step
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def rank_words(rank: int, local_rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}


def fork_rank(rank: int, local_rank: int, module: str) -> int:
    """Run the module in a child, which has these ranks; returns its process id."""
    child = os.fork()
    if child:
        return child
    os.environ |= rank_words(rank, local_rank)
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)
