"""Snapshots: all that a run needs to be resumed, with any number of ranks and any ZeRO stage.

A snapshot is a folder checkpoint-N, N being the number of optimizer steps done. It is an adapter in
PEFT's format, and beside it lie snapshot.safetensors, with AdamW's state, and snapshot.json, with
the `State` of the run. Tensors are whole and stored by the parameter's name: how they were
partitioned over the ranks that wrote them plays no part.
"""

from __future__ import annotations

import itertools
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

from minilora.data.tokenizer_files import TokenizerFiles
from minilora.files.adapter import patiently, write_adapter, write_atomically
from minilora.files.records import STATE, restored
from minilora.model.lora_shape import LoraShape
from minilora.settings.errors import RequestError
from minilora.settings.text_files import read_json

TENSORS = "snapshot.safetensors"
PREFIX = "checkpoint-"
# Ends the name of a folder while it is being written, and while it is being deleted.
DRAFT = ".draft"


@dataclass(frozen=True)
class State:
    """Where a run stands: the content of snapshot.json.

    step: how many optimizer steps are done.
    rows: how many documents were trained on since the start, all epochs together.
    log_totals: the sums that the log is computed from (report.run_log.Totals), so that it goes on
    as if the run had not been interrupted; empty before the first step.
    must_match: what the run that resumes must have in common with the one that wrote this, by
    name: settings of the optimizer, the adapter's shape, digests of base weights and data
    (training.same_run).
    about: what may change from one run to the next, for people who read the file: ranks, stage,
    settings, versions. `written` is the time of writing, in seconds since 1970.
    best: the best validation so far (training.best_model.Best); empty before the first.
    """

    step: int
    rows: int
    log_totals: dict[str, Any]
    must_match: dict[str, Any]
    about: dict[str, Any]
    best: dict[str, Any] = field(default_factory=dict)


def snapshot_folder(output: Path, step: int) -> Path:
    """Where the snapshot after this many steps lies."""
    return output / f"{PREFIX}{step}"


def write_snapshot(
    output: Path,
    state: State,
    adapter: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    lora: LoraShape,
    base: TokenizerFiles,
) -> Path:
    """Write checkpoint-N, and return its folder. It gets its name when everything is in it.

    adapter: the fp32 masters of the trained parameters, by name, on the CPU. moments: AdamW's state
    as `NAME.exp_avg` and `NAME.exp_avg_sq`; if there are none, only the adapter is written, and the
    snapshot cannot be resumed from. Raises OSError.
    """
    final = snapshot_folder(output, state.step)
    bits = state.must_match.get("quantization_bit")

    def write() -> None:
        draft = _unused_draft(final)
        try:
            write_adapter(draft, adapter, lora, base, bits)
            if moments:
                write_atomically(draft / TENSORS, save({**adapter, **moments}, {"format": "pt"}))
                dated = replace(state, about={**state.about, "written": time.time()})
                text = json.dumps(asdict(dated), indent=2) + "\n"
                write_atomically(draft / STATE, text.encode())

            # An earlier run in this folder may have left a snapshot of the same step.
            if final.exists():
                shutil.rmtree(set_aside(final), ignore_errors=True)
            os.replace(draft, final)
        except OSError:
            # On a full disk half a snapshot would take the room that others need.
            shutil.rmtree(draft, ignore_errors=True)
            raise

    patiently(write)
    return final


def last_snapshot(output: Path, place: str = "") -> str:
    """A sentence for the end of a run: which snapshot it can be resumed from.

    place: words behind its name, such as the machine that it is on
    """
    try:
        folder = find_snapshot(output, "true")
    except OSError:
        folder = None
    if folder is None:
        return "there is no snapshot to resume from"
    return f"the last snapshot is {folder}{place}: --resume_from_checkpoint true resumes from there"


def find_snapshot(output: Path, request: str | None) -> Path | None:
    """The snapshot that `resume_from_checkpoint` asks for.

    request: a folder; or `true` for the snapshot in `output` that was written last and can be
    resumed from, None if there is none; or `false` or None for no snapshot.
    Raises RequestError if the folder is no snapshot that can be resumed from.
    """
    if request is None or request.lower() == "false":
        return None
    if request.lower() == "true":
        resumable = [folder for folder in snapshots(output) if (folder / STATE).exists()]
        # Of several that were written at the same time, the one with the greatest number.
        return max(reversed(resumable), key=_time_written, default=None)
    if not (Path(request) / STATE).exists():
        raise RequestError(
            [
                f"resume_from_checkpoint: {request} holds no {STATE}; name a {PREFIX}N of "
                "minilora's, or begin anew from an adapter: adapter_name_or_path"
            ]
        )
    return Path(request)


def _time_written(folder: Path) -> float:
    """When a snapshot was written, in seconds since 1970.

    Neither the step nor the file's own time tells: an earlier run in the same folder may have got
    further, and copying a folder changes the times of its files.
    """
    try:
        return float(read_json(folder / STATE)["about"]["written"])
    except RequestError:
        # A broken snapshot counts as the newest: whoever reads it then says that it is broken, and
        # no older one is taken in silence.
        return math.inf
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0.0


def read_state(folder: Path) -> State:
    """Read where the run stood that wrote this snapshot. Raises RequestError."""
    return restored(State, read_json(folder / STATE), folder)


def read_tensors(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read the fp32 masters and AdamW's state of a snapshot, by name.

    expected: the shape of each tensor by its name. Raises RequestError if the file holds others.
    """
    path = folder / TENSORS
    try:
        held = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RequestError([f"{path}: cannot be read: {error}"]) from None

    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    if shapes != dict(expected):
        wrong = min(name for name, _ in set(shapes.items()) ^ set(expected.items()))
        raise RequestError([f"{path}: {wrong} is not as this run has it"])
    return held


def snapshots(output: Path) -> list[Path]:
    """All snapshots that were written to the end, in the order of their numbers."""
    found = [
        folder
        for folder in output.glob(f"{PREFIX}*")
        if folder.name.removeprefix(PREFIX).isdecimal() and folder.is_dir()
    ]
    return sorted(found, key=step_of)


def step_of(snapshot: Path) -> int:
    return int(snapshot.name.removeprefix(PREFIX))


def set_aside(folder: Path) -> Path:
    """Rename a snapshot to a draft, which takes one moment; deleting takes many. Raises OSError.

    A network file system can rename a folder whose files are still open somewhere.
    """
    draft = _unused_draft(folder)
    os.replace(folder, draft)
    return draft


def _unused_draft(folder: Path) -> Path:
    """A draft's name that nothing has; what cannot be deleted yet has others. Raises OSError."""
    for number in itertools.count():
        draft = folder.with_name(f"{folder.name}.{number}{DRAFT}")
        if not draft.exists():
            return draft
    raise AssertionError("itertools.count() ends never")
