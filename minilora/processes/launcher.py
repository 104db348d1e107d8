"""What a launcher tells its processes, and what is said when they cannot join by it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from minilora.settings.errors import JoinError, RequestError

# What torch.distributed reads once RANK is set (torch/distributed/rendezvous.py).
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
WHOLE_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
LAUNCHERS = "torchrun and deepspeed set them all"


def ranks_of_this_machine() -> int | None:
    """How many ranks the launcher started on this machine; None if it does not say."""
    # Torchrun's word, then that of DeepSpeed's launcher.
    said = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ""
    return int(said) if said.isdecimal() else None


def several_machines() -> bool:
    """Whether the launcher has started processes on other machines too, as far as it says so."""
    here = ranks_of_this_machine()
    return here is not None and "RANK" in os.environ and str(here) != os.environ.get("WORLD_SIZE")


def check_launcher() -> None:
    """Raise RequestError if the environment says only a part of what a launcher says."""
    values = {name: os.environ[name] for name in {*NEEDED, *WHOLE_NUMBERS} & os.environ.keys()}
    problems = [
        f"{name}={values[name]}: a whole number is needed; {LAUNCHERS}"
        for name in WHOLE_NUMBERS
        if name in values and not values[name].isdecimal()
    ]
    missing = [name for name in NEEDED if name not in values]
    if "RANK" in values and missing:
        problems.append(
            f"RANK is set, but not {', '.join(missing)}: {LAUNCHERS}; for one process, unset RANK"
        )
    if not problems and "RANK" in values and int(values["RANK"]) >= int(values["WORLD_SIZE"]):
        rank, size = values["RANK"], values["WORLD_SIZE"]
        problems.append(f"RANK={rank} of WORLD_SIZE={size}: ranks count from 0; {LAUNCHERS}")
    if problems:
        raise RequestError(problems)


@contextmanager
def joining() -> Iterator[None]:
    """Turn what torch says when processes cannot join into one line.

    Raises RequestError for a port that is taken, JoinError for anything else.
    """
    try:
        yield
    except RuntimeError as error:
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        if "EADDRINUSE" in str(error):
            raise RequestError(
                [
                    f"MASTER_PORT: port {port} of {address} is taken by another program, perhaps "
                    "by another run: give the launcher another one (deepspeed --master_port N, "
                    "torchrun --master-port N)"
                ]
            ) from None
        reason = " ".join(str(error).partition("\n")[0].split())
        raise JoinError(
            f"the processes could not join at {address}:{port}: {reason}; do MASTER_ADDR and "
            "MASTER_PORT name rank 0's machine?"
        ) from None
