"""Start a module on several ranks, forked from one process that has imported torch and DeepSpeed.

python -m tests.support.forked RANKS MODULE [ARGUMENTS]

RANKS is a number, or MACHINESxRANKS: then the processes learn from their environment that they are
so many machines with so many ranks each.

Those imports take each process of a launcher about five seconds of CPU time. Ranks that are forked
are processes like a launcher's, with the same environment variables, and joined over gloo in the
same way. Only the imports are shared. What needs a real launcher (its signals, its words, its
environment) is tested with one.
"""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import signal
import sys
import traceback

from minilora.processes.ports import free_port


def prepare_to_fork() -> None:
    """Import what ranks would import later, and keep imported modules out of their garbage."""
    importlib.import_module("minilora.training.run")
    importlib.import_module("torch._dynamo")  # torch's optimizers import it, which takes seconds
    gc.freeze()  # DeepSpeed collects garbage each time it starts


def main() -> int:
    """As under a launcher, the failure of one rank ends the others, and its exit code is ours."""
    places, module = sys.argv[1:3]
    del sys.argv[1:3]
    machines, _, here = f"1x{places}".rpartition("x")
    local = int(here)
    ranks = local * int(machines.rpartition("x")[2])
    prepare_to_fork()
    os.environ |= {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    running = {fork_rank(rank, rank % local, module) for rank in range(ranks)}
    failure = 0
    while running:
        ended, status = os.wait()
        running.discard(ended)
        if status and not failure:
            failure = os.waitstatus_to_exitcode(status)
            for process in running:
                os.kill(process, signal.SIGKILL)
    return failure


def fork_rank(rank: int, local_rank: int, module: str) -> int:
    """Run the module in a child, which has these ranks; returns its process id."""
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
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


if __name__ == "__main__":
    sys.exit(main())
