"""output_dir: has it room, may it be written, and does another run hold it?"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minilora.settings.errors import RequestError

LOCK = ".lock"
ROOM = 3  # snapshots that must fit when a run starts: the one kept, the next one, and one to spare


def check_room(output: Path, adapter_bytes: int) -> None:
    """Raise RequestError unless output_dir can be written and has room for a few snapshots.

    adapter_bytes: of the adapter in fp32; a snapshot has it twice, and two moments.
    """
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise RequestError([f"output_dir: {there} is a file; name another folder"])
    if not os.access(there, os.W_OK | os.X_OK):
        raise RequestError([f"output_dir: {there} cannot be written; name another folder"])
    free, needed = shutil.disk_usage(there).free, ROOM * 4 * adapter_bytes
    if free < needed:
        raise RequestError(
            [
                f"output_dir: {there} has {free / 1e9:.2g} GB free, {ROOM} snapshots of this "
                f"adapter need {needed / 1e9:.2g} GB; free some, or name another folder"
            ]
        )


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Make output_dir and keep other runs out of it. Raises RequestError."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise RequestError([f"output_dir: {output} cannot be written: {error.strerror}"]) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RequestError(
                [f"output_dir: {output} is in use by {file.read()}; name another folder"]
            ) from None
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):  # the disk may be why the run ends
                file.truncate(0)


def is_claimed(output: Path) -> bool:
    """Whether a run has output_dir, or was killed while it had it."""
    try:
        return bool((output / LOCK).read_text(encoding="utf-8"))
    except OSError:
        return False
