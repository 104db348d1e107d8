"""What a run must have in common with the snapshot that it resumes from.

Every difference is told with what was and what is. Where digests differ, the user learns which
tensor, file or setting made them differ, for nobody can do anything about a digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from minilora import __version__
from minilora.data.documents import Documents
from minilora.data.sources import find_sources
from minilora.data.tokenizer_files import TokenizerFiles
from minilora.files.snapshot import State
from minilora.files.weights import Checkpoint
from minilora.model.lora_shape import LoraShape
from minilora.settings.settings import DataSettings, Settings

# Settings that must not change between a snapshot and the run that resumes from it: with another
# value the steps before and after the snapshot would belong to two different runs.
UNCHANGING = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "warmup_steps",
    "weight_decay",
    "loraplus_lr_ratio",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "seed",
    "disable_shuffling",
)
# Keys of `must_match` whose values are not settings.
DATA = "data"
LORA = "lora"
WEIGHTS = "base weights"


def known_before_loading(
    settings: Settings, lora: LoraShape, documents: Documents
) -> dict[str, Any]:
    """What must match, but for the base weights: those are known once they have been read."""
    return {
        DATA: documents.fingerprint(),
        LORA: asdict(lora),
        "packing": settings.packs,
        "quantization_bit": settings.model.quantization_bit,
        **{key: getattr(settings.train, key) for key in UNCHANGING},
    }


def base_digest(checkpoint: Checkpoint, sums: Mapping[str, int]) -> dict[str, str]:
    """What must match of the base weights: dtype, shape and sum of each tensor, by its name.

    sums: of all ranks together, as files.weights_digest makes them.
    """
    return {
        name: f"{stored.dtype} {list(stored.shape)} {sums[name]:016x}"
        for name, stored in checkpoint.tensors.items()
    }


def data_digests(settings: Settings, base: TokenizerFiles) -> dict[str, str]:
    """A digest of every file that the documents come from, to tell later which one has changed.

    base: the tokenizer's files. Raises RequestError and OSError.
    """
    digests = {}
    names = settings.data.dataset
    sources = find_sources(names, Path(settings.data.dataset_dir))
    for name, source in zip(names, sources, strict=True):
        digest = hashlib.sha256()
        with source.path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
        digests[name] = digest.hexdigest()
    for name, content in base.contents.items():
        digests[name] = hashlib.sha256(content).hexdigest()
    return digests


def differences(state: State, now: State, folder: Path) -> list[str]:
    """A line for each thing in which a run differs from the snapshot in `folder`, and the way on.

    state: of the snapshot. now: of the run that is to resume; only the keys of its must_match are
    compared, and its `about` serves for the explanation.
    """
    # The snapshot's values have been through JSON, which makes lists of tuples.
    before, after = state.must_match, _as_json(now.must_match)
    lines: list[str] = []
    for key in after:
        if before.get(key) != after[key]:
            lines += _difference(key, before.get(key), after[key], state, now)
    if not lines:
        return []
    way_on = (
        "undo these changes, or begin a new run with the adapter of that snapshot: "
        f"adapter_name_or_path: {folder}, without resume_from_checkpoint"
    )
    return [*(f"resume_from_checkpoint: {folder} was made with {line}" for line in lines), way_on]


def _difference(key: str, before: Any, after: Any, state: State, now: State) -> Iterator[str]:
    """How one entry of `must_match` differs, in words that go on after "was made with"."""
    if key == DATA:
        yield f"other data: {'; '.join(_changes_of_data(state.about, now.about))}"
    elif key == WEIGHTS:
        yield f"other base weights: {_changes_of_weights(before, after, state.about, now.about)}"
    elif key == LORA and isinstance(before, dict):
        for field in after:
            if before.get(field) != after[field]:
                yield f"lora {field} = {before.get(field)!r}, this run has {after[field]!r}"
    else:
        yield f"{key} = {before!r}, this run has {after!r}"


def _changes_of_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which settings and files made the documents others. before, now: the runs' `about`."""
    old, new = before.get("settings", {}), _as_json(now["settings"])
    # Documents to validate with are chosen apart, and packing is compared on its own.
    keys = {field.name for field in fields(DataSettings)} - {"eval_dataset", "packing"}
    changes = [
        f"{key} was {old.get(key)!r}, is {new[key]!r}"
        for key in new
        if key in keys | {"stage"} and key in old and old[key] != new[key]
    ]

    old_files, new_files = before.get("data files", {}), now["data files"]
    changes += [
        f"{name} has changed since"
        for name, digest in new_files.items()
        if name in old_files and old_files[name] != digest
    ]
    if not changes:
        version = before.get("versions", {}).get("minilora")
        changes = [f"the same files made other tokens (minilora was {version}, is {__version__})"]
    return changes


def _changes_of_weights(
    before: Any, after: Mapping[str, str], about: Mapping[str, Any], now: Mapping[str, Any]
) -> str:
    """Which base weights differ, and where they came from."""
    if not isinstance(before, dict):
        return "its version of minilora noted too little of them to compare"
    different = [name for name, digest in after.items() if before.get(name) != digest]
    key = "model_name_or_path"
    old_folder = about.get("settings", {}).get(key)
    more = f" and {len(different) - 1} more" if len(different) > 1 else ""
    verb = "differ" if more else "differs"
    return f"{different[0]}{more} {verb} ({key} was {old_folder}, is {now['settings'][key]})"


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
