"""Train a LoRA adapter: `deepspeed --num_gpus 7 --module minilora.train CONFIG.yaml`."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from minilora.processes.launcher import several_machines
from minilora.processes.signals import Stopped, stopping_at_once
from minilora.settings.command_line import read_settings
from minilora.settings.errors import JoinError, RequestError, RunError
from minilora.settings.settings import Settings
from minilora.settings.terminal import Lasting

# Seconds that the other ranks leave to rank 0 for its message; the launcher ends them sooner.
LAST_WORDS = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 done, 1 the run failed, 2 the request is wrong, 128 + signal."""
    # Torch logs with a trace of C++ when a connection ends that our own messages tell of.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        settings = _read(sys.argv[1:] if argv is None else argv)

        # Imported after the settings are read, because importing torch and DeepSpeed takes longer
        # than refusing a wrong setting; and before signals raise, because C code that imports
        # swallows what is raised in it.
        from minilora.training.run import run

        with stopping_at_once():
            run(settings)
    except RequestError as error:
        return _refuse(2, error.problems)
    except RunError as error:
        return 1 if error.told else _refuse(1, [str(error)], isinstance(error, JoinError))
    except KeyboardInterrupt:  # before signals raise Stopped
        if _is_rank0():
            print("error: SIGINT: stopped before the start", file=sys.stderr, flush=True)
        return 130
    except Stopped as stopped:
        return _refuse(128 + stopped.number, [str(stopped)])
    except Exception as error:
        return _failed(error)
    return 0


def _read(argv: Sequence[str]) -> Settings | RequestError:
    """The settings, or what is wrong with them.

    With several machines that is told when all have joined: their files may differ. Raises
    RequestError where there is one machine.
    """
    try:
        return read_settings(argv, "train")
    except RequestError as error:
        if not several_machines():
            raise
        return error


def _is_rank0() -> bool:
    """Whether this process speaks for all. One that no launcher started speaks for itself."""
    return os.environ.get("RANK", "0") == "0" or "MASTER_ADDR" not in os.environ


def _refuse(code: int, problems: Sequence[str], apart: bool = False) -> int:
    """Rank 0 says what is wrong. The others wait, so that its words and exit code are the first.

    apart: the machines did not find each other, so a rank of each says it
    """
    if _is_rank0() or (apart and os.environ.get("LOCAL_RANK") == "0"):
        print(*(f"error: {problem}" for problem in problems), sep="\n", file=sys.stderr, flush=True)
        return code

    # The launcher may pass a Ctrl-C on. It must end the wait without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Ranks that have joined fail together, so rank 0 has spoken by now. Before that, rank 0 may
    # still be importing torch.
    time.sleep(1 if _have_joined() else LAST_WORDS)
    return code


def _have_joined() -> bool:
    """Whether this process has joined the others; before torch is imported it cannot have."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_initialized()


def _failed(error: Exception) -> int:
    """Say what happened on this rank. The launcher ends the others, which wait for this one."""
    from minilora.memory.measured import is_out_of_memory

    if is_out_of_memory(error):
        print(f"error: out of memory before the training: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    return 1


def leave(code: int) -> NoReturn:
    """End the process without tearing the interpreter down.

    Threads of torch that ask for the interpreter's lock while it ends abort the process (seen in
    2 of 56 processes on a busy CPU), and a finished run would count as a failed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.stdout = Lasting(sys.stdout.buffer, write_through=True)
    sys.stderr = Lasting(sys.stderr.buffer, write_through=True)
    leave(main())
