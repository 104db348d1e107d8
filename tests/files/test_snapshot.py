"""Snapshots: written whole, found again, deleted in the right order, and refused by name."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minilora.data.tokenizer_files import read_tokenizer_files
from minilora.files.adapter import WEIGHTS
from minilora.files.adapter_config import CONFIG
from minilora.files.records import restored
from minilora.files.rotation import prune
from minilora.files.snapshot import (
    DRAFT,
    PREFIX,
    STATE,
    TENSORS,
    State,
    find_snapshot,
    read_state,
    write_snapshot,
)
from minilora.model.lora_shape import LoraShape
from minilora.report.run_log import Totals
from minilora.settings.errors import RequestError
from minilora.training.best_model import Best

LORA = LoraShape(3, 12, 0.0, ("q_proj",))


def written(output: Path, tiny: Path, state: State) -> Path:
    """A snapshot with this state."""
    adapter = {"model.layers.0.self_attn.q_proj.lora_A": torch.randn(3, 32)}
    moments = {"moment": torch.ones(2)}
    return write_snapshot(output, state, adapter, moments, LORA, read_tokenizer_files(tiny))


def test_a_power_cut_leaves_whole_files_and_no_half_snapshot(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was renamed was whole on the disk before; what makes a folder valid comes last."""
    synced: dict[Path, int] = {}
    renamed: list[tuple[Path, Path]] = []
    sync = os.fsync
    rename = os.replace

    def noted_sync(handle: int) -> None:
        synced[Path(f"/proc/self/fd/{handle}").resolve()] = os.fstat(handle).st_size
        sync(handle)

    def noted_replace(old: Path, new: Path) -> None:
        renamed.append((old, new))
        if old.is_file():
            assert synced[old] == old.stat().st_size > 0, old
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    folder = written(tmp_path / "out", tiny, State(5, 60, {}, {}, {}))
    names = [new.name for _, new in renamed]
    assert names[0] == WEIGHTS and names[-4:] == [CONFIG, TENSORS, STATE, "checkpoint-5"]
    prune(folder.parent, None, folder)
    assert [*synced][-1] == folder.parent, "the rename itself"


def test_a_full_disk_leaves_no_draft(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    written(tmp_path, tiny, State(5, 60, {}, {}, {}))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path, tiny, State(6, 70, {}, {}, {}))
    assert [path.name for path in tmp_path.iterdir()] == [f"{PREFIX}5"]


def test_a_snapshot_of_the_same_step_is_replaced_though_it_is_busy(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, tiny, State(5, 60, {}, {}, {}))
    remove = os.unlink

    def busy(path: Any, **options: Any) -> None:
        if not str(path).endswith(".tmp"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        remove(path, **options)

    monkeypatch.setattr(os, "unlink", busy)
    folder = written(tmp_path, tiny, State(5, 99, {}, {}, {}))
    assert read_state(folder).rows == 99


def test_what_was_written_is_read_back(tiny: Path, tmp_path: Path) -> None:
    state = State(
        step=5,
        rows=60,
        log_totals=asdict(Totals(step=5, tokens=9)),
        must_match={"seed": 1, "packing": False},
        about={"ranks": 2},
        best=asdict(
            Best(criterion=["eval_loss", False, "digest"], step=4, value=0.5, folder="there")
        ),
    )
    folder = written(tmp_path, tiny, state)
    held = read_state(folder)
    assert held.about.pop("written") > 1e9, "seconds since 1970"
    assert held == state
    assert restored(Totals, held.log_totals, folder) == Totals(step=5, tokens=9)
    assert restored(Best, held.best, folder).value == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # The fields of the first format.
        (
            {"totals": {}, "same": {}, "info": {}, "log_totals": None, "must_match": None,
             "about": None},
            "not a snapshot of this version .* differs in about, info, log_totals, must_match, "
            "same, totals; resume with the version that wrote it, or begin anew from its adapter",
        ),
        ({"best": None}, "differs in best;"),
        ({"step": "5"}, "step is '5', not of type int"),
        ({"step": True}, "step is True, not of type int"),
        ({"must_match": []}, r"must_match is \[\], not of type dict"),
    ],
)  # fmt: skip
def test_a_state_of_another_version_is_refused_by_name(
    tiny: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """None: the key is not there."""
    folder = written(tmp_path, tiny, State(5, 60, {}, {}, {}))
    values = json.loads((folder / STATE).read_text(encoding="utf-8")) | change
    values = {key: value for key, value in values.items() if value is not None}
    (folder / STATE).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(RequestError, match=f"checkpoint-5/snapshot.json: .*{message}"):
        read_state(folder)


@pytest.mark.parametrize("kind", [Best, Totals])
def test_records_in_the_state_of_another_version_are_refused_by_name(kind: Any) -> None:
    saved = asdict(kind())
    assert restored(kind, saved, Path("checkpoint-5")) == kind()
    older = {key: value for key, value in saved.items() if key != "step"} | {"after": 1}
    with pytest.raises(RequestError, match="checkpoint-5/snapshot.json: .* differs in after, step"):
        restored(kind, older, Path("checkpoint-5"))
    with pytest.raises(RequestError, match="step is 1.5, not of type int"):
        restored(kind, {**saved, "step": 1.5}, Path("checkpoint-5"))


def test_an_adapter_alone_is_no_snapshot_to_resume_from(tiny: Path, tmp_path: Path) -> None:
    state = State(5, 60, {}, {}, {})
    folder = write_snapshot(tmp_path, state, {}, {}, LORA, read_tokenizer_files(tiny))
    assert (folder / CONFIG).exists()
    assert find_snapshot(tmp_path, "true") is None
    with pytest.raises(RequestError, match="checkpoint-5 holds no snapshot.json"):
        find_snapshot(tmp_path, str(folder))
    newer = written(tmp_path, tiny, replace(state, step=6))
    assert find_snapshot(tmp_path, "true") == find_snapshot(tmp_path, str(newer)) == newer
    assert find_snapshot(tmp_path, "false") is find_snapshot(tmp_path, None) is None


def test_the_newest_snapshot_is_found_by_its_number_if_it_can_be_gone_on_from(
    tmp_path: Path,
) -> None:
    """After 9 comes 10; 11 is an adapter alone, 12 a file, 13 a draft."""
    for name in ("9", "10", "11", f"13{DRAFT}"):
        (tmp_path / f"{PREFIX}{name}").mkdir()
        if name != "11":
            (tmp_path / f"{PREFIX}{name}" / STATE).touch()
    (tmp_path / f"{PREFIX}12").touch()
    assert find_snapshot(tmp_path, "true") == tmp_path / f"{PREFIX}10"
    prune(tmp_path, 1, tmp_path / f"{PREFIX}11")
    assert {path.name for path in tmp_path.iterdir()} == {f"{PREFIX}11", f"{PREFIX}12"}


def test_the_newest_snapshot_is_the_one_written_last(tmp_path: Path) -> None:
    """An earlier run in the folder got to step 900; a copy gives every file another time."""
    for step, about in ((900, {"written": 1.0}), (950, {}), (3, {"written": 2.0}), (2, {})):
        folder = tmp_path / f"{PREFIX}{step}"
        folder.mkdir()
        (folder / STATE).write_text(json.dumps({"about": about}))
    assert find_snapshot(tmp_path, "true") == tmp_path / f"{PREFIX}3"
    (tmp_path / f"{PREFIX}2" / STATE).write_text("{")
    assert find_snapshot(tmp_path, "true") == tmp_path / f"{PREFIX}2", "broken: never in silence"


@pytest.mark.parametrize("about", [None, [], "x", {"written": "x"}, {"written": 10**400}])
def test_a_time_of_writing_that_is_none_is_the_oldest(tmp_path: Path, about: Any) -> None:
    for step, value in ((2, {"written": 1.0}), (9, about)):
        folder = tmp_path / f"{PREFIX}{step}"
        folder.mkdir()
        (folder / STATE).write_text(json.dumps({"about": value}))
    assert find_snapshot(tmp_path, "true") == tmp_path / f"{PREFIX}2"
