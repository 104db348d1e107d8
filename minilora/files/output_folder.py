"""output_dir before a run: has it room, may it be written, and does another run hold it?"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from minilora.settings.errors import RequestError

LOCK = ".lock"
# How often the lock file is opened anew after another run has deleted it; more than twice in a row
# is hardly possible.
OPENINGS = 100
# How many snapshots must fit when a run starts: the last one is deleted only when the next is
# written, and one is to spare.
SNAPSHOTS = 3
# A snapshot holds the trained parameters in fp32 twice, as adapter and as masters, and two moments.
ADAPTERS_IN_A_SNAPSHOT = 4


def check_room(output: Path, adapter_bytes: int, reclaimed: int = 0) -> None:
    """Raise RequestError unless output_dir can be written and has room for a few snapshots.

    adapter_bytes: the size of the trained parameters in fp32. reclaimed: how many bytes the run
    will free there before it writes.
    """
    # The folder need not be there yet; then the lowest folder above it that is there counts.
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise RequestError([f"output_dir: {there} is a file; name another folder"])
    if not os.access(there, os.W_OK | os.X_OK):
        raise RequestError([f"output_dir: {there} cannot be written; name another folder"])

    free = shutil.disk_usage(there).free + reclaimed
    needed = SNAPSHOTS * ADAPTERS_IN_A_SNAPSHOT * adapter_bytes
    if free < needed:
        raise RequestError(
            [
                f"output_dir: {there} has {free / 1e9:.2g} GB free, {SNAPSHOTS} snapshots of this "
                f"adapter need {needed / 1e9:.2g} GB; free some, or name another folder"
            ]
        )


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Make output_dir and keep other runs out of it. Raises RequestError.

    The folder is claimed by a lock (flock) on the file `.lock`, which says who has it. The kernel
    drops the lock when the process ends, also by kill -9. The file is deleted when the run ends in
    good order; after a kill it stays, with its text, and the next run takes it over.
    """
    with _locked(output) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            # A full or broken disk may be the reason why the run ends; it is not hidden by this.
            with suppress(OSError):
                file.truncate(0)
                _delete(output / LOCK, file)


def is_claimed(output: Path) -> bool:
    """Whether a run has output_dir, or was killed while it had it."""
    try:
        return bool((output / LOCK).read_text(encoding="utf-8"))
    except OSError:
        return False


def _locked(output: Path) -> TextIO:
    """The lock file, open and locked. Raises RequestError if another process has the lock."""
    for _ in range(OPENINGS):
        try:
            output.mkdir(parents=True, exist_ok=True)
            file = (output / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            problem = f"{output} cannot be written: {error.strerror}"
            raise RequestError([f"output_dir: {problem}"]) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            problem = f"{output} is in use by {holder}; name another folder"
            raise RequestError([f"output_dir: {problem}"]) from None
        except OSError:
            return file  # this file system has no locks; then nothing keeps other runs out

        # Between opening and locking, a run that ended may have deleted the file. Then the lock is
        # on a file without a name, which nobody else will find, and a new one is needed.
        if _is_at(output / LOCK, file):
            return file
        file.close()
    problem = f"{output / LOCK} is replaced all the time; name another folder"
    raise RequestError([f"output_dir: {problem}"])


def _delete(path: Path, file: TextIO) -> None:
    """Delete the lock file while its lock is held, so that no other run holds it."""
    # The folder may have been moved away meanwhile, and another run may have made it anew.
    if _is_at(path, file):
        path.unlink()


def _is_at(path: Path, file: TextIO) -> bool:
    """Whether the open file is the one that lies at the path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
