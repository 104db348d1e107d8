"""Adapters written into the base's weights, or as one adapter, for programs that serve models."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from minilora.files.adapter import (
    CONFIG,
    WEIGHTS,
    check_adapter,
    check_tensors,
    read_adapter_shape,
    stored_name,
    write_adapter,
)
from minilora.files.weights import INDEX, SINGLE, Checkpoint, StoredTensor
from minilora.model.llama_shape import LlamaShape
from minilora.model.lora_shape import MAGNITUDE, WHOLE, LoraShape
from minilora.settings.errors import RequestError, RunError
from minilora.settings.text_files import read_json

CHUNK = 2**22  # bytes of a file in memory at a time
# What lies beside weights and is not theirs: weights in other formats, other adapters.
NOT_COPIED = re.compile(r".*\.(safetensors|bin|pth|pt|gguf)|.*\.bin\.index\.json|adapter_.*")


# Changes some rows of a weight, given and returned in fp32.
Change = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class LoraUpdate:
    """The update factor * B A of one layer; A (rank, in) and B (out, rank) lie in `file`.

    dora: rows are then brought to the lengths (out,) that lie there too.
    """

    file: Path
    layer: str
    rank: int
    factor: float
    dora: bool = False

    def read(self) -> tuple[Tensor, Tensor]:
        """A and B in fp32."""
        with safe_open(self.file, framework="pt") as opened:
            a, b = (opened.get_tensor(stored_name(f"{self.layer}.lora_{ab}")) for ab in "AB")
        return a.float(), b.float()

    def change(self) -> Change:
        a, b = self.read()
        lengths = None
        if self.dora:
            with safe_open(self.file, framework="pt") as opened:
                lengths = opened.get_tensor(stored_name(f"{self.layer}.{MAGNITUDE}")).float()

        def merged(weight: Tensor, rows: slice) -> Tensor:
            weight.addmm_(b[rows], a, alpha=self.factor)
            if lengths is not None:
                weight *= (lengths[rows] / weight.norm(dim=1))[:, None]
            return weight

        return merged


@dataclass(frozen=True)
class WholeUpdate:
    """A weight that was trained without LoRA and takes the place of the base's."""

    file: Path
    layer: str

    def change(self) -> Change:
        opened = safe_open(self.file, framework="pt")  # once: a head comes in hundreds of chunks
        name = stored_name(f"{self.layer}.weight")
        stored: Any = opened.get_slice(name)  # type: ignore[no-untyped-call]

        def replaced(_: Tensor, rows: slice) -> Tensor:
            part: Tensor = stored[rows]
            return part.float()

        return replaced


Update = LoraUpdate | WholeUpdate
Updates = Mapping[str, Sequence[Update]]  # by layer, such as model.layers.0.self_attn.q_proj


def read_updates(folder: Path, weight: float, model: LlamaShape) -> dict[str, Update]:
    """What an adapter does to each layer, its factors times `weight`.

    Raises RequestError for what `read_adapter_shape` and `check_tensors` do not take, and for what
    cannot be scaled by a weight other than 1.
    """
    lora, file = read_adapter_shape(folder, model, dropout=0.0), folder / WEIGHTS
    check_tensors(folder, lora.parameter_shapes(model))
    if weight != 1 and (lora.use_dora or lora.modules_to_save):
        problem = "use_dora and modules_to_save cannot be scaled; leave --adapter_weights out"
        raise RequestError([f"{folder / CONFIG}: {problem}"])
    whole = [WHOLE[name].removesuffix(".weight") for name in lora.modules_to_save]
    pairs = {
        path: LoraUpdate(file, path, layer.rank, weight * layer.scaling, layer.dora)
        for path, layer in lora.layers(model).items()
    }
    return {**pairs, **{path: WholeUpdate(file, path) for path in whole}}


def clashes(updates: Updates) -> list[str]:
    """Layers where several adapters meet that cannot be added up."""
    return [
        f"{layer}: with use_dora or modules_to_save, one adapter alone can change a layer"
        for layer, all_of_it in updates.items()
        if len(all_of_it) > 1
        and not all(isinstance(u, LoraUpdate) and not u.dora for u in all_of_it)
    ]


def export_merged(checkpoint: Checkpoint, updates: Updates, folder: Path) -> None:
    """Write the base with the updates added: same files, index, tensors, dtypes.

    Everything is written and read back in a folder inside `folder`, then moved into place,
    config.json last. Host memory: a few chunks, and A and B of one layer.
    Raises RunError if a merged weight is not finite, or a file does not read back as written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
        for path in sorted(checkpoint.folder.iterdir()):
            if path.is_file() and not NOT_COPIED.fullmatch(path.name):
                shutil.copyfile(path, Path(partial) / path.name)
        index = checkpoint.folder / INDEX
        names = set(read_json(index)["weight_map"].values()) if index.exists() else {SINGLE}
        for file in (checkpoint.folder / name for name in sorted(names)):
            changed = [
                (stored, updates[layer])
                for layer in updates
                if (stored := checkpoint.tensors[f"{layer}.weight"]).file == file
            ]
            _write_checked(Path(partial) / file.name, _merged(file, changed))
        for path in sorted(Path(partial).iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)


def _merged(
    file: Path, changed: Sequence[tuple[StoredTensor, Sequence[Update]]]
) -> Iterator[bytes]:
    """The bytes of a weight file, header and all; only numbers of changed tensors differ."""
    with file.open("rb") as opened:
        for stored, updates in sorted(changed, key=lambda item: item[0].start):
            yield from _copied(opened, stored.start - opened.tell())
            rows, columns = stored.shape
            step = max(1, CHUNK // (columns * stored.dtype.itemsize))
            changes = [update.change() for update in updates]
            for first in range(0, rows, step):
                count = min(step, rows - first) * columns
                data = bytearray(opened.read(count * stored.dtype.itemsize))
                merged = torch.frombuffer(data, dtype=stored.dtype).view(-1, columns).float()
                for change in changes:
                    merged = change(merged, slice(first, first + step))
                rounded = merged.to(stored.dtype)
                if not rounded.isfinite().all():
                    raise RunError(f"{updates[0].layer}: not finite in {stored.dtype} once merged")
                yield rounded.view(torch.uint8).numpy().tobytes()
        yield from _copied(opened, sys.maxsize)


def _copied(opened: BinaryIO, count: int) -> Iterator[bytes]:
    """The next `count` bytes, or those to the end of the file if there are fewer."""
    while count and (data := opened.read(min(count, CHUNK))):
        count -= len(data)
        yield data


def _write_checked(path: Path, chunks: Iterator[bytes]) -> None:
    meant = found = 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            meant = zlib.crc32(chunk, meant)
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb") as file:
        for chunk in _copied(file, sys.maxsize):
            found = zlib.crc32(chunk, found)
    if found != meant:
        raise RunError(f"{path} does not read back as it was written; check the disk")


def export_adapter(checkpoint: Checkpoint, updates: Updates, folder: Path) -> LoraShape:
    """Write the updates as one adapter with one rank and one alpha, for servers that know no more.

    Ranks add up where several adapters meet, and are filled with zeros to the largest; what the
    one alpha / rank does not scale is scaled in B. Raises RequestError for what is no pair alone,
    RunError if it does not read back.
    """
    pairs: dict[str, list[LoraUpdate]] = {}
    for layer, all_of_it in updates.items():
        pairs[layer] = [u for u in all_of_it if isinstance(u, LoraUpdate) and not u.dora]
        if len(pairs[layer]) < len(all_of_it):
            problem = f"{layer} has use_dora or modules_to_save, which such servers do not load"
            raise RequestError([f"--adapter_only: {problem}; merge into the base instead"])
    rank = max(sum(pair.rank for pair in of_layer) for of_layer in pairs.values())
    largest = max(pair.factor for of_layer in pairs.values() for pair in of_layer)
    alpha = max(1, round(rank * largest))
    names = {layer.split(".")[-1] for layer in pairs}
    targets = tuple(name for name in checkpoint.shape.linear_shapes() if name in names)
    lora = LoraShape(rank, alpha, 0.0, targets)
    tensors: dict[str, Tensor] = {}
    for layer, (rows, columns, *_) in lora.layers(checkpoint.shape).items():
        a, b, end = torch.zeros(rank, columns), torch.zeros(rows, rank), 0
        for pair in pairs.get(layer, ()):
            start, end = end, end + pair.rank
            a[start:end], b[:, start:end] = pair.read()
            b[:, start:end] *= pair.factor / (alpha / rank)
        tensors |= {f"{layer}.lora_A": a, f"{layer}.lora_B": b}
    write_adapter(folder, tensors, lora, checkpoint.folder)
    check_adapter(folder, tensors)
    return lora
