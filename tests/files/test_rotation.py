"""Which snapshots are deleted, as the HF Trainer does it, and what a network share may refuse."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import rotate_checkpoints

from minilora.data.tokenizer_files import read_tokenizer_files
from minilora.files.adapter import WEIGHTS
from minilora.files.rotation import prune
from minilora.files.snapshot import (
    DRAFT,
    PREFIX,
    STATE,
    TENSORS,
    State,
    find_snapshot,
    write_snapshot,
)
from minilora.model.lora_shape import LoraShape

# All that Python's file functions ask of the system. Of close() it is never known what it did.
CALLS = [(io, "open"), *((os, name) for name in (
    "fstat", "fsync", "lstat", "mkdir", "open", "replace", "rmdir", "scandir", "stat", "unlink",
))]  # fmt: skip


def test_nothing_is_deleted_before_its_successor_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        (tmp_path / f"{PREFIX}{step}").mkdir()
    at_sync = []
    monkeypatch.setattr(os, "fsync", lambda _: at_sync.append(len(list(tmp_path.iterdir()))))
    prune(tmp_path, 1, tmp_path / f"{PREFIX}2")
    assert at_sync == [2] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.ENOENT])
def test_a_share_that_cannot_flush_a_folder_is_told_and_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for step in (1, 2):
        (tmp_path / f"{PREFIX}{step}").mkdir()

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    (warning,) = prune(tmp_path, 1, tmp_path / f"{PREFIX}2")
    assert f"{tmp_path} cannot be flushed to the disk ({os.strerror(number)})" in warning
    assert [path.name for path in tmp_path.iterdir()] == [f"{PREFIX}2"]


def test_a_broken_disk_is_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        prune(tmp_path, 1, tmp_path / f"{PREFIX}2")


def test_what_cannot_be_deleted_stays_as_a_draft_and_the_others_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is open on another machine keeps its folder there: EBUSY."""
    for step in (1, 2, 3):
        (tmp_path / f"{PREFIX}{step}").mkdir()
        (tmp_path / f"{PREFIX}{step}" / STATE).touch()
    remove = os.rmdir

    def busy(path: Any, **options: Any) -> None:
        if f"{PREFIX}1" in str(path):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        remove(path, **options)

    monkeypatch.setattr(os, "rmdir", busy)
    (warning,) = prune(tmp_path, 1, tmp_path / f"{PREFIX}3")
    draft = f"{PREFIX}1.0{DRAFT}"
    assert warning.startswith(f"{tmp_path / draft} cannot be deleted: Device or resource busy")
    assert {path.name for path in tmp_path.iterdir()} == {draft, f"{PREFIX}3"}
    assert find_snapshot(tmp_path, "true") == tmp_path / f"{PREFIX}3"
    monkeypatch.undo()
    assert prune(tmp_path, 1, tmp_path / f"{PREFIX}3") == []
    assert [path.name for path in tmp_path.iterdir()] == [f"{PREFIX}3"]


def test_what_is_gone_already_needs_no_deleting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else deletes an old snapshot at the same moment."""
    for step in (1, 2, 3):
        (tmp_path / f"{PREFIX}{step}").mkdir()
    rename = os.replace

    def late(old: Path, new: Path) -> None:
        old.rmdir()
        rename(old, new)

    monkeypatch.setattr(os, "replace", late)
    assert prune(tmp_path, 1, tmp_path / f"{PREFIX}3") == []
    assert [path.name for path in tmp_path.iterdir()] == [f"{PREFIX}3"]


def test_leftovers_of_an_earlier_run_go_first(tmp_path: Path) -> None:
    for step in (2, 4, 900):
        (tmp_path / f"{PREFIX}{step}").mkdir()
    (tmp_path / f"{PREFIX}6{DRAFT}").mkdir()
    prune(tmp_path, 2, tmp_path / f"{PREFIX}4")
    assert {path.name for path in tmp_path.iterdir()} == {f"{PREFIX}2", f"{PREFIX}4"}


def test_what_is_pruned_is_what_the_trainer_prunes(tmp_path: Path) -> None:
    for keep in (None, 1, 2, 3):
        for best in (None, 2, 4, 8):
            kept = []
            for place in ("ours", "theirs"):
                folder = tmp_path / f"{keep}-{best}-{place}"
                for step in (2, 4, 6, 8):
                    (folder / f"checkpoint-{step}").mkdir(parents=True)
                found = None if best is None else folder / f"checkpoint-{best}"
                if place == "ours":
                    prune(folder, keep, folder / "checkpoint-8", found)
                else:
                    rotate_checkpoints(str(folder), keep, found and str(found))
                kept.append({path.name for path in folder.iterdir()})
            assert kept[0] == kept[1], (keep, best)


@contextmanager
def failing(number: int, at: int) -> Iterator[list[str]]:
    """The at-th call to the file system fails, counted from 0. Gives the names of all calls."""
    called: list[str] = []

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            called.append(name)
            if len(called) == at + 1:
                raise OSError(number, os.strerror(number), args[0])
            return original(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minilora.files.adapter.PAUSE_SECONDS", 0.0)
        for owner, name in CALLS:
            patch.setattr(owner, name, wrapped(name, getattr(owner, name)))
        yield called


@pytest.mark.parametrize(
    "number", [errno.EBUSY, errno.ENOENT, errno.EINVAL, errno.ENOLCK, errno.ESTALE]
)
def test_a_share_that_fails_once_at_any_call_costs_no_snapshot(
    tiny: Path, tmp_path: Path, number: int
) -> None:
    """Old ones to delete, one of the same step to replace, and a draft: every branch is taken."""
    base = read_tokenizer_files(tiny)
    lora = LoraShape(3, 12, 0.0, ("q_proj",))
    adapter = {"model.layers.0.self_attn.q_proj.lora_A": torch.randn(3, 32)}
    moments = {"moment": torch.randn(2)}

    calls = 1  # known after the first round, in which none fails
    for at in range(-1, 10**6):
        if at == calls:
            break
        output = tmp_path / str(at)
        for name in ("1", "2", "3", f"3.0{DRAFT}"):
            (output / f"{PREFIX}{name}").mkdir(parents=True)
            (output / f"{PREFIX}{name}" / STATE).write_text('{"about": {"written": 1.0}}')
        with failing(number, at) as called:
            newest = write_snapshot(output, State(3, 9, {}, {}, {}), adapter, moments, lora, base)
            warnings = prune(output, 1, newest)

        assert find_snapshot(output, "true") == newest, (at, called[at])
        assert len(warnings) <= 1, warnings
        (tensor,) = load_file(newest / WEIGHTS).values()
        assert torch.equal(tensor, *adapter.values())
        for name, saved in load_file(newest / TENSORS).items():
            assert torch.equal(saved, {**adapter, **moments}[name])
        # Whatever stayed behind goes with the next snapshot.
        assert prune(output, 1, newest) == []
        assert [path.name for path in output.iterdir()] == [newest.name], (at, called[at])
        calls = len(called) if at < 0 else calls
    assert calls > 30
