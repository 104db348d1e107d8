"""output_dir: without room or leave to write it is refused, and two runs never hold it at once."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from minilora.files.output_folder import LOCK, check_room, claimed, is_claimed
from minilora.files.rotation import delete_drafts, draft_bytes
from minilora.files.snapshot import DRAFT, PREFIX
from minilora.settings.errors import RequestError

IN_USE = f"in use by process {os.getpid()} on .*; name another folder"


def claim(output: Path) -> ExitStack:
    """Claim a folder until the stack is closed."""
    stack = ExitStack()
    stack.enter_context(claimed(output))
    return stack


def test_output_dir_may_not_be_there_yet_but_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="output_dir: .*/file is a file"):
        check_room(tmp_path / "file" / "out", 0)
    check_room(tmp_path / "new" / "out", 1000)
    assert not (tmp_path / "new").exists(), "checking leaves nothing behind"


@pytest.mark.slow
def test_output_dir_needs_room_and_leave_to_write(tmpfs: Callable[[str], Path | None]) -> None:
    small = tmpfs("64k")
    if small is None:
        pytest.skip("mounting a file system needs root")
    with pytest.raises(RequestError, match="has 6.6e-05 GB free, 3 snapshots .* need 0.012 GB"):
        check_room(small / "out", 10**6)
    draft = small / "out" / f"{PREFIX}3{DRAFT}"
    draft.mkdir(parents=True)
    (draft / "tensors").write_bytes(bytes(40_000))
    with pytest.raises(RequestError, match="GB free"):
        check_room(small / "out", 4000)
    check_room(small / "out", 4000, draft_bytes(small / "out"))
    assert delete_drafts(small / "out") == []
    check_room(small / "out", 4000)
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    for refuse in (lambda: check_room(small / "out", 0), claimed(small / "out").__enter__):
        with pytest.raises(RequestError, match=f"output_dir: {small}.* cannot be written"):
            refuse()


def test_a_claim_keeps_others_out_and_leaves_nothing_behind(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    assert not is_claimed(output)
    with claimed(output):
        with pytest.raises(RequestError, match=IN_USE), claimed(output):
            pass
        assert is_claimed(output)
    assert list(output.iterdir()) == [] and not is_claimed(output)
    with pytest.raises(ZeroDivisionError), claimed(output):
        raise ZeroDivisionError
    assert list(output.iterdir()) == [], "also where the run fails"


@pytest.mark.slow
def test_kill_9_frees_the_folder_but_leaves_a_trace(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from minilora.files.output_folder import claimed
with claimed(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert done.returncode == -9
    assert is_claimed(tmp_path), "it was killed while it had the folder"
    with claimed(tmp_path), pytest.raises(RequestError, match=IN_USE), claimed(tmp_path):
        pass
    assert not is_claimed(tmp_path)


def test_a_lock_on_a_deleted_file_is_no_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that had the folder ends just when another one has opened its lock file."""
    first = claim(tmp_path)
    lock = fcntl.flock

    def lock_late(*args: Any) -> None:
        first.close()
        lock(*args)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with claimed(tmp_path):
        monkeypatch.undo()
        assert (tmp_path / LOCK).exists()
        with pytest.raises(RequestError, match=IN_USE), claimed(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_folder_was_moved_deletes_no_other_runs_lock(tmp_path: Path) -> None:
    output = tmp_path / "out"
    moved = claim(output)
    output.rename(tmp_path / "moved")
    with claimed(output):
        moved.close()
        with pytest.raises(RequestError, match=IN_USE), claimed(output):
            pass
    assert not is_claimed(tmp_path / "moved"), "it ended in good order"


def test_a_file_system_without_locks_is_tolerated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with claimed(tmp_path):
        assert is_claimed(tmp_path)
    assert list(tmp_path.iterdir()) == []
