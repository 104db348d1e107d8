"""Snapshots: what a run needs to go on, by name, for any number of ranks and any ZeRO stage."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from minilora.files.adapter import write_adapter, write_atomically
from minilora.model.lora_shape import LoraShape
from minilora.settings.errors import RequestError
from minilora.settings.text_files import read_json

STATE, TENSORS = "snapshot.json", "snapshot.safetensors"
PREFIX, DRAFT = "checkpoint-", ".draft"


@dataclass(frozen=True)
class State:
    """Where a run stands.

    step: optimizer steps done; rows: documents consumed since the start, all epochs together;
    totals: sums of the log; same: settings and fingerprints that must not change, by name;
    info: what may change, for people (ranks, stage, settings, versions); best: a run.best.Best.
    """

    step: int
    rows: int
    totals: dict[str, Any]
    same: dict[str, Any]
    info: dict[str, Any]
    best: dict[str, Any] = field(default_factory=dict)


def snapshot_folder(output: Path, step: int) -> Path:
    return output / f"{PREFIX}{step}"


def write_snapshot(
    output: Path, state: State, adapter: Mapping[str, Tensor], moments: Mapping[str, Tensor],
    lora: LoraShape, base: Path,
) -> Path:  # fmt: skip
    """Write checkpoint-N with a PEFT adapter in it, then rename it into place when it is whole.

    moments: empty for an adapter alone, which cannot be resumed from. Raises OSError.
    """
    final = snapshot_folder(output, state.step)
    draft = final.with_name(final.name + DRAFT)
    shutil.rmtree(draft, ignore_errors=True)
    write_adapter(draft, adapter, lora, base)
    if moments:
        write_atomically(draft / TENSORS, save({**adapter, **moments}, {"format": "pt"}))
        dated = asdict(replace(state, info={**state.info, "written": time.time()}))
        write_atomically(draft / STATE, (json.dumps(dated, indent=2) + "\n").encode())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(draft, final)
    _sync(output)
    return final


def prune(output: Path, keep: int | None, newest: Path, best: Path | None = None) -> None:
    """Delete the oldest snapshots beyond `keep`, and what dying runs left half written.

    Those with greater numbers than the newest are leftovers of an earlier run, older than all. The
    newest and the best (an absolute path) stay, as in the HF Trainer, even where `keep` is one.
    """
    for draft in output.glob(f"{PREFIX}*{DRAFT}"):
        shutil.rmtree(draft)
    found = _snapshots(output)
    found = [*found[found.index(newest) + 1 :], *found[: found.index(newest) + 1]]
    old = [folder for folder in found if folder != newest and folder.resolve() != best]
    spared = max((keep or len(found)) - (len(found) - len(old)), 0)
    for folder in old[: -spared or None]:
        shutil.rmtree(folder)


def last_snapshot(output: Path) -> str:
    """Where a run that has ended can go on from, in words."""
    try:
        folder = find_snapshot(output, "true")
    except OSError:
        folder = None
    if folder is None:
        return "there is no snapshot to go on from"
    return f"the last snapshot is {folder}: --resume_from_checkpoint true goes on from there"


def find_snapshot(output: Path, request: str | None) -> Path | None:
    """The newest snapshot that can be resumed from for `true` (None if there is none), or a path.

    Raises RequestError if a path names no snapshot.
    """
    if request is None or request.lower() == "false":
        return None
    if request.lower() == "true":
        whole = [folder for folder in reversed(_snapshots(output)) if (folder / STATE).exists()]
        return max(whole, key=_written, default=None)
    if not (Path(request) / STATE).exists():
        raise RequestError(
            [
                f"resume_from_checkpoint: {request} holds no {STATE}; name a {PREFIX}N of "
                "minilora's, or begin anew from an adapter: adapter_name_or_path"
            ]
        )
    return Path(request)


def _written(folder: Path) -> float:
    """When a snapshot was written: an earlier run in the folder may have left greater numbers."""
    try:
        return float(read_json(folder / STATE)["info"]["written"])
    except RequestError:
        return math.inf  # broken, which is said when it is read
    except (KeyError, TypeError, ValueError):
        return 0.0


def read_state(folder: Path) -> State:
    """Read where the run stood. Raises RequestError."""
    values = read_json(folder / STATE)
    if values.keys() != State.__dataclass_fields__.keys():
        raise RequestError([f"{folder / STATE}: not a snapshot of this version of minilora"])
    return State(**values)


def read_tensors(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Masters and moments by name. Raises RequestError unless names and shapes are as expected."""
    try:
        held = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise RequestError([f"{folder / TENSORS}: cannot be read: {error}"]) from None
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    if shapes != dict(expected):
        wrong = sorted(set(shapes.items()) ^ set(expected.items()))[0][0]
        raise RequestError([f"{folder / TENSORS}: {wrong} is not as this run has it"])
    return held


def differences(state: State, same: Mapping[str, Any], folder: Path) -> list[str]:
    """What of a run differs from the snapshot it is to go on from, a line each."""
    return [
        f"resume_from_checkpoint: {folder} was made with {key} = {state.same.get(key)!r}, "
        f"this run has {value!r}"
        for key, value in same.items()
        if state.same.get(key) != json.loads(json.dumps(value))
    ]


def _snapshots(output: Path) -> list[Path]:
    """All whole snapshots, oldest first."""
    found = [
        folder
        for folder in output.glob(f"{PREFIX}*")
        if folder.name.removeprefix(PREFIX).isdigit() and folder.is_dir()
    ]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix(PREFIX)))


def _sync(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
