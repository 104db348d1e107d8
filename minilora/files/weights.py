"""Base weights from safetensors files: checked whole first, then read in the pieces one needs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minilora.files.model_config import ModelConfig
from minilora.model.llama_shape import LlamaShape
from minilora.settings.errors import RequestError, shortened
from minilora.settings.text_files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The dtypes that Llama weights come in, by safetensors' names.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Old exports carry the rotary frequencies, which follow from config.json.
DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `start` is the offset of its first byte in `file`."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a Llama in it whose files have been checked against its config.json."""

    folder: Path
    shape: LlamaShape
    tensors: Mapping[str, StoredTensor]

    @property
    def total_bytes(self) -> int:
        return sum(
            torch.Size(stored.shape).numel() * stored.dtype.itemsize
            for stored in self.tensors.values()
        )


@dataclass(frozen=True)
class TensorPart:
    """Elements `start` to `start + len(destination)` of a flattened tensor, and where they go."""

    name: str
    start: int
    destination: Tensor


def read_checkpoint(config: ModelConfig) -> Checkpoint:
    """Read the headers of all weight files and check them; no weights are read yet.

    Raises RequestError naming every file and tensor that is missing, surplus, cut short, outside
    the folder, or of another shape or dtype than config.json implies.
    """
    folder, shape = config.folder, config.shape
    problems: list[str] = []
    tensors: dict[str, StoredTensor] = {}
    for file, names in _files(folder, problems).items():
        held = _read_header(file, problems)
        if names is not None and held:
            problems += [f"{file}: {name} is missing, though the index says it is here"
                         for name in sorted(names - held.keys())]  # fmt: skip
            problems += [f"{file}: {name} is here, but not in {INDEX}"
                         for name in sorted(held.keys() - names)]  # fmt: skip
        tensors.update(held)
    expected = shape.parameter_shapes()
    if not problems:
        problems = shortened(_compare(tensors, expected, folder))
    if problems:
        raise RequestError(problems)
    return Checkpoint(folder, shape, {name: tensors[name] for name in expected})


def read_parts(checkpoint: Checkpoint, pieces: Iterable[TensorPart]) -> int:
    """Read each piece from its file straight into its destination, converting the dtype.

    Returns the bytes read. Host memory beside the destinations: the largest piece.
    Raises RequestError if a file ended early or a weight is not finite.
    """
    total, scratch = 0, torch.empty(0, dtype=torch.uint8)
    with ExitStack() as stack:
        handles: dict[Path, BinaryIO] = {}
        for piece in pieces:
            stored = checkpoint.tensors[piece.name]
            if stored.file not in handles:
                handles[stored.file] = stack.enter_context(stored.file.open("rb", buffering=0))
            size = piece.destination.numel() * stored.dtype.itemsize
            if len(scratch) < size:
                scratch = torch.empty(size, dtype=torch.uint8)  # fresh pages cost more than reading
            numbers = scratch[:size].view(stored.dtype)
            _read_numbers(handles[stored.file], stored, piece, numbers)
            # NaN goes through minimum and maximum; isfinite() itself takes a hundred times as long.
            if not torch.stack(torch.aminmax(numbers)).isfinite().all():
                raise RequestError([f"{stored.file}: {piece.name} holds NaN or infinite weights"])
            piece.destination.copy_(numbers)
            total += numbers.nbytes
    return total


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells checkpoints apart: a digest of the final norm, which every fine-tune moves."""
    norm = torch.empty(checkpoint.shape.hidden_size)
    read_parts(checkpoint, [TensorPart("model.norm.weight", 0, norm)])
    return hashlib.sha256(norm.numpy().tobytes()).hexdigest()


def _files(folder: Path, problems: list[str]) -> dict[Path, set[str] | None]:
    """The weight files, each with the tensors that the index puts there (None without index)."""
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            problems.append(
                f"{folder}: no {SINGLE} and no {INDEX}; weights are read from safetensors files"
            )
            return {}
        return {folder / SINGLE: None}
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        problems.append(f"{folder / INDEX}: weight_map is missing or empty")
        return {}
    files: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.strip("."):
            problems.append(f"{folder / INDEX}: {name} lies in {file!r}, outside the folder")
            continue
        names = files.setdefault(folder / file, set())
        assert names is not None
        names.add(name)
    return files


def _read_header(file: Path, problems: list[str]) -> dict[str, StoredTensor]:
    """The tensors of one file; the library checks header, offsets and the file's length."""
    if not file.exists():
        problems.append(f"{file}: no such file, though {INDEX} names it; download it again")
        return {}
    if not _is_inside(file):
        problems.append(f"{file}: leads out of its folder; put the file itself there")
        return {}
    try:
        # For numpy, since for torch it maps the file writable, which a small machine refuses.
        with safe_open(file, framework="np") as opened:
            shapes = {
                name: (tuple(part.get_shape()), part.get_dtype())
                for name in opened.keys()  # noqa: SIM118 (not a mapping)
                for part in (opened.get_slice(name),)
            }
        with file.open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        problems.append(f"{file}: not a whole safetensors file ({error}); download it again")
        return {}
    held = {}
    for name, (shape, dtype) in shapes.items():
        if dtype not in DTYPES:
            problems.append(f"{file}: {name} is {dtype}; {', '.join(DTYPES)} can be read")
            continue
        start = 8 + size + int(header[name]["data_offsets"][0])
        held[name] = StoredTensor(file, start, shape, DTYPES[dtype])
    return held


def _is_inside(file: Path) -> bool:
    """Whether it is a plain file of its folder, or of the hub's cache that the folder is part of.

    There snapshots/REVISION/NAME is a link to blobs/HASH.
    """
    folder, target = file.parent.resolve(), file.resolve()
    in_cache = folder.parent.name == "snapshots" and target.parent == folder.parents[1] / "blobs"
    return target.is_file() and (target.parent == folder or in_cache)


def _compare(
    tensors: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], folder: Path
) -> list[str]:
    problems = [f"{folder}: {name} is missing" for name in expected if name not in tensors]
    for name, stored in tensors.items():
        if name not in expected:
            # A tied head may be written out though it equals the embedding.
            if name != "lm_head.weight" and not DERIVED.fullmatch(name):
                problems.append(f"{stored.file}: {name} is not part of a Llama of this config.json")
        elif stored.shape != expected[name]:
            problems.append(
                f"{stored.file}: {name} has shape {list(stored.shape)}, "
                f"config.json implies {list(expected[name])}"
            )
    return problems


def _read_numbers(
    handle: BinaryIO, stored: StoredTensor, piece: TensorPart, numbers: Tensor
) -> None:
    """Fill `numbers` with the piece's elements, flat, in the dtype of the file."""
    handle.seek(stored.start + piece.start * stored.dtype.itemsize)
    buffer, done = numbers.view(torch.uint8).numpy().data, 0
    while done < len(buffer):
        count = handle.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise RequestError([f"{stored.file}: ends inside {piece.name}; download it again"])
        done += count
