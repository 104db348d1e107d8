"""Train on every GPU of this machine: `minilora train CONFIG.yaml [--key value ...]`.

It starts `minilora.train` with DeepSpeed's launcher, once for each GPU. Without a GPU it starts
one process on the CPU, or as many as --num_gpus says.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from minilora.processes.ports import free_port
from minilora.settings.command_line import read_options
from minilora.settings.errors import RequestError, exit_code

VISIBLE = "CUDA_VISIBLE_DEVICES"

# What a run on a CPU needs in its environment, unless the user has set it.
ON_CPU: Mapping[str, str] = {
    "DS_ACCELERATOR": "cpu",
    # Several processes that each use all cores stand in each other's way.
    "OMP_NUM_THREADS": "1",
    # Some virtual machines announce AMX and then kill the process that uses it.
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Check the settings, then become DeepSpeed's launcher. Returns 2 if the request is wrong.

    The launcher takes the place of this process, so its exit code is that of the command, and
    signals reach it directly.
    """
    return exit_code(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> None:
    # The launcher takes seconds to start. A wrong setting is refused before that.
    parser = _parser()
    own, _ = read_options(parser, argv, "train")
    arguments = parser.parse_known_args(argv)[1]

    command, changes = launcher(arguments, own.num_gpus, count_gpus(), os.environ)
    os.environ.update(changes)
    os.execv(command[0], command)


def launcher(
    arguments: Sequence[str], asked: int | None, gpus: int, environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The command that starts a run, and what it changes in the environment.

    arguments: of `minilora.train`. asked: how many processes to start, None for the default.
    gpus: how many this machine has, as far as CUDA_VISIBLE_DEVICES shows them.

    Raises RequestError for a number of processes that cannot be started, and for GPUs that are not
    named by their numbers.
    """
    if asked is not None and asked < 1:
        raise RequestError(["--num_gpus must be above 0"])
    if gpus and asked is not None and asked > gpus:
        raise RequestError([f"--num_gpus: {asked}; this machine shows {gpus}: lower it"])

    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
    command += ["--master_port", str(free_port())]
    changes: dict[str, str] = {}
    if not gpus:
        command += ["--num_gpus", str(asked or 1)]
        changes = {name: environment.get(name, value) for name, value in ON_CPU.items()}
    else:
        # Not by the launcher's own --num_gpus: with it, it ignores CUDA_VISIBLE_DEVICES.
        visible = environment.get(VISIBLE, "").split(",") if environment.get(VISIBLE) else []
        if not all(name.strip().isdecimal() for name in visible):
            problem = "DeepSpeed's launcher takes numbers alone, such as 0,1"
            raise RequestError([f"{VISIBLE}: {environment[VISIBLE]}: {problem}"])
        if asked is not None and asked < gpus:
            chosen = visible or [str(number) for number in range(gpus)]
            changes[VISIBLE] = ",".join(chosen[:asked])
    return [*command, "--module", "minilora.train", *arguments], changes


def count_gpus() -> int:
    """How many GPUs torch sees. Without a driver of NVIDIA there are none, and torch is not asked:
    importing it takes seconds."""
    if not shutil.which("nvidia-smi") and not Path("/proc/driver/nvidia").exists():
        return 0
    import torch

    return torch.cuda.device_count()


def _parser() -> argparse.ArgumentParser:
    """What is this command's own; everything else is a setting."""
    parser = argparse.ArgumentParser("minilora train", add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--num_gpus",
        type=int,
        metavar="N",
        help="GPUs to train on, or processes where there is no GPU [all GPUs, or 1 process]",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
