"""Which snapshots are deleted, and when: an old one goes once the new one is on the disk.

Nothing of a run is lost when an old folder cannot be deleted. Network shares refuse that at times,
so it is told, and the run goes on.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from minilora.files.adapter import DISK_ERRORS
from minilora.files.snapshot import DRAFT, PREFIX, set_aside, snapshots, step_of


def prune(output: Path, keep: int | None, newest: Path, best: Path | None = None) -> list[str]:
    """Delete the oldest snapshots, so that `keep` are left, and drafts that killed runs have left.

    keep: None for all. newest: the snapshot just written. best: the one with the best validation,
    as an absolute path. These two stay even where `keep` is 1, as in the HF Trainer.
    Returns warnings: nothing of the run is lost when an old folder cannot be deleted, or when the
    file system cannot flush a folder. Raises OSError for a disk that is broken or full.
    """
    # Before anything is deleted, the name of what replaces it has to be on the disk.
    warnings = _sync(output)

    # Numbers beyond the newest's were left by an earlier run in this folder: older than all others.
    try:
        found = snapshots(output)
    except OSError as error:
        return [*warnings, _cannot_list(output, error)]
    oldest_first = [folder for folder in found if step_of(folder) > step_of(newest)]
    oldest_first += [folder for folder in found if folder not in oldest_first]
    may_go = [folder for folder in oldest_first if folder != newest and folder.resolve() != best]
    surplus = 0 if keep is None else max(len(found) - keep, 0)

    # A folder that is half deleted must not look like a snapshot, so it becomes a draft first.
    for folder in may_go[:surplus]:
        try:
            set_aside(folder)
        except FileNotFoundError:
            continue  # gone already, which is all that was wanted
        except OSError as error:
            warnings.append(_cannot_delete(folder, error))
    return warnings + delete_drafts(output)


def delete_drafts(output: Path) -> list[str]:
    """Delete what runs left that ended while they wrote or deleted a snapshot.

    Returns a warning for each that cannot be deleted; nothing ever resumes from one.
    """
    try:
        drafts = _drafts(output)
    except OSError as error:
        return [_cannot_list(output, error)]

    warnings = []
    for draft in drafts:
        try:
            shutil.rmtree(draft)
        except FileNotFoundError:
            continue
        except OSError as error:
            warnings.append(_cannot_delete(draft, error))
    return warnings


def draft_bytes(output: Path) -> int:
    """How much room `delete_drafts` will make."""
    total = 0
    for draft in _drafts(output):
        with suppress(OSError):  # another process may be deleting it
            total += sum(file.stat().st_size for file in draft.iterdir())
    return total


def _drafts(output: Path) -> list[Path]:
    return sorted(output.glob(f"{PREFIX}*{DRAFT}"))


def _cannot_list(folder: Path, error: OSError) -> str:
    return f"{folder} cannot be listed: {error.strerror}; nothing old is deleted in it now"


def _cannot_delete(folder: Path, error: OSError) -> str:
    return f"{folder} cannot be deleted: {error.strerror}; delete it when the run is over"


def _sync(folder: Path) -> list[str]:
    """Make sure that renames in a folder are on the disk, so that a power cut undoes none.

    Returns a warning if the file system cannot do that: many of a network say EINVAL or ENOTSUP.
    Only a power cut could then undo the renaming. Raises OSError for one of DISK_ERRORS.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        reason = f"{folder} cannot be flushed to the disk ({error.strerror})"
        return [f"{reason}: a power cut may undo the last snapshot, but not the one before"]
    return []
