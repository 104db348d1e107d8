"""Adapters exported for other programs: merged into the base's weights, or as one plain adapter.

What an adapter does to one layer is an update of that layer's weight. `export_merged` writes a copy
of the base in which all updates are added; `export_adapter` writes the updates as a LoRA adapter
with one rank and one alpha, for servers that load no other kind.
"""

# Shape letters: R rank; `in` and `out` are a linear layer's features.

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

from minilora.data.tokenizer_files import read_tokenizer_files
from minilora.files.adapter import (
    WEIGHTS,
    check_adapter,
    check_tensors,
    stored_name,
    write_adapter,
)
from minilora.files.adapter_config import CONFIG, read_adapter_shape
from minilora.files.weights import INDEX, SINGLE, Checkpoint, StoredTensor
from minilora.model.llama_shape import LlamaShape
from minilora.model.lora_shape import MAGNITUDE, WHOLE, LoraShape
from minilora.settings.errors import RequestError, RunError
from minilora.settings.text_files import read_json

CHUNK = 2**22  # how many bytes of a file are in memory at a time
# What is not copied from the base's folder: weights in any format, and other adapters.
NOT_COPIED = re.compile(r".*\.(safetensors|bin|pth|pt|gguf)|.*\.bin\.index\.json|adapter_.*")

# Takes rows of a weight in fp32 and where they lie in it; returns what becomes of them, in fp32.
ChangeRows = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class LoraUpdate:
    """The update `factor * B A` of one layer's weight, (out, in).

    file: holds A (R, in) and B (out, R).
    layer: its path, such as model.layers.0.self_attn.q_proj.
    dora: whether the file also holds DoRA's magnitudes (out,), the lengths that the rows of the
    updated weight are then brought to.
    """

    file: Path
    layer: str
    rank: int
    factor: float
    dora: bool = False

    def read(self) -> tuple[Tensor, Tensor]:
        """Read A and B, as fp32."""
        with safe_open(self.file, framework="pt") as opened:
            a = opened.get_tensor(stored_name(f"{self.layer}.lora_A"))
            b = opened.get_tensor(stored_name(f"{self.layer}.lora_B"))
        return a.float(), b.float()

    def changer(self) -> ChangeRows:
        """Read the tensors of the update, and return the function that applies it to rows."""
        a, b = self.read()
        magnitudes = None
        if self.dora:
            with safe_open(self.file, framework="pt") as opened:
                magnitudes = opened.get_tensor(stored_name(f"{self.layer}.{MAGNITUDE}")).float()

        def change(weight: Tensor, rows: slice) -> Tensor:
            weight.addmm_(b[rows], a, alpha=self.factor)
            if magnitudes is not None:
                weight *= (magnitudes[rows] / weight.norm(dim=1))[:, None]
            return weight

        return change


@dataclass(frozen=True)
class WholeUpdate:
    """A weight that was trained without LoRA: it takes the place of the base's weight."""

    file: Path
    layer: str

    def changer(self) -> ChangeRows:
        """Open the file, and return the function that reads the rows asked for."""
        # Opened once and not for each chunk of rows: a head comes in hundreds of them.
        opened = safe_open(self.file, framework="pt")
        name = stored_name(f"{self.layer}.weight")
        stored: Any = opened.get_slice(name)  # type: ignore[no-untyped-call]

        def change(_: Tensor, rows: slice) -> Tensor:
            part: Tensor = stored[rows]
            return part.float()

        return change


Update = LoraUpdate | WholeUpdate
Updates = Mapping[str, Sequence[Update]]  # by the path of the layer


def read_updates(folder: Path, weight: float, model: LlamaShape) -> dict[str, Update]:
    """What an adapter does to each layer that it changes, with its factors times `weight`.

    Raises RequestError for what `read_adapter_shape` and `check_tensors` refuse, and where a weight
    other than 1 cannot be applied.
    """
    lora = read_adapter_shape(folder, model, dropout=0.0)
    check_tensors(folder, lora.parameter_shapes(model))
    if weight != 1 and (lora.use_dora or lora.modules_to_save):
        problem = "use_dora and modules_to_save cannot be scaled; leave --adapter_weights out"
        raise RequestError([f"{folder / CONFIG}: {problem}"])

    file = folder / WEIGHTS
    updates: dict[str, Update] = {}
    for path, layer in lora.layers(model).items():
        updates[path] = LoraUpdate(file, path, layer.rank, weight * layer.scaling, layer.dora)
    for name in lora.modules_to_save:
        path = WHOLE[name].removesuffix(".weight")
        updates[path] = WholeUpdate(file, path)
    return updates


def clashes(updates: Updates) -> list[str]:
    """A problem for each layer whose updates come from several adapters and cannot be added up."""
    return [
        f"{layer}: with use_dora or modules_to_save, one adapter alone can change a layer"
        for layer, of_layer in updates.items()
        if len(of_layer) > 1 and len(_addable(of_layer)) < len(of_layer)
    ]


def _addable(updates: Sequence[Update]) -> list[LoraUpdate]:
    """Those updates that are a product B A and nothing else, so that their sum is one too."""
    return [update for update in updates if isinstance(update, LoraUpdate) and not update.dora]


def export_merged(checkpoint: Checkpoint, updates: Updates, folder: Path) -> None:
    """Write the base with the updates added. Files, index, names and dtypes stay as they are.

    Everything is first written to a folder inside `folder` and read back, then moved into place.
    Host memory: a few chunks of CHUNK bytes, and A and B of the layer that is being changed.
    Raises RunError if a merged weight is not finite, or a file does not read back as written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as name:
        partial = Path(name)
        for path in sorted(checkpoint.folder.iterdir()):
            if path.is_file() and not NOT_COPIED.fullmatch(path.name):
                shutil.copyfile(path, partial / path.name)
        for file in _weight_files(checkpoint):
            _write_checked(partial / file.name, _merged_file(file, checkpoint, updates))

        # A folder with a config.json counts as a model, so this file is moved when all others are.
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)


def _weight_files(checkpoint: Checkpoint) -> list[Path]:
    """All weight files of a checkpoint.

    The index may name a file of which the model uses nothing, such as one with a tied head.
    """
    index = checkpoint.folder / INDEX
    if not index.exists():
        return [checkpoint.folder / SINGLE]
    names = set(read_json(index)["weight_map"].values())
    return [checkpoint.folder / name for name in sorted(names)]


def _merged_file(file: Path, checkpoint: Checkpoint, updates: Updates) -> Iterator[bytes]:
    """The bytes of a weight file, header included; only the numbers of changed tensors differ."""
    changed = []
    for layer, of_layer in updates.items():
        stored = checkpoint.tensors[f"{layer}.weight"]
        if stored.file == file:
            changed.append((stored, of_layer))

    # In the order of the file, so that it is read from the beginning to the end.
    changed.sort(key=lambda pair: pair[0].start)
    with file.open("rb") as opened:
        for stored, of_layer in changed:
            yield from _copied(opened, stored.start - opened.tell())
            yield from _merged_tensor(opened, stored, of_layer)
        yield from _copied(opened, sys.maxsize)


def _merged_tensor(
    opened: BinaryIO, stored: StoredTensor, updates: Sequence[Update]
) -> Iterator[bytes]:
    """The bytes of the tensor that begins where `opened` stands, with the updates applied.

    The sum is taken in fp32 and rounded once to the dtype of the file. Raises RunError if it is
    not finite there.
    """
    rows, columns = stored.shape
    row_bytes = columns * stored.dtype.itemsize
    rows_at_a_time = max(1, CHUNK // row_bytes)
    changers = [update.changer() for update in updates]

    for first in range(0, rows, rows_at_a_time):
        end = min(first + rows_at_a_time, rows)
        data = bytearray(opened.read((end - first) * row_bytes))
        merged = torch.frombuffer(data, dtype=stored.dtype).view(-1, columns).float()
        for change in changers:
            merged = change(merged, slice(first, end))

        rounded = merged.to(stored.dtype)
        if not rounded.isfinite().all():
            raise RunError(f"{updates[0].layer}: not finite in {stored.dtype} once merged")
        yield rounded.view(torch.uint8).numpy().tobytes()


def _copied(opened: BinaryIO, count: int) -> Iterator[bytes]:
    """The next `count` bytes of a file in chunks, or those to its end if there are fewer."""
    while count and (data := opened.read(min(count, CHUNK))):
        count -= len(data)
        yield data


def _write_checked(path: Path, chunks: Iterator[bytes]) -> None:
    """Write a file and read it back. Raises RunError if the disk did not keep what was written."""
    written = 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            written = zlib.crc32(chunk, written)
        file.flush()
        os.fsync(file.fileno())

    read_back = 0
    with path.open("rb") as file:
        for chunk in _copied(file, sys.maxsize):
            read_back = zlib.crc32(chunk, read_back)
    if read_back != written:
        raise RunError(f"{path} does not read back as it was written; check the disk")


def export_adapter(checkpoint: Checkpoint, updates: Updates, folder: Path) -> LoraShape:
    """Write the updates as one LoRA adapter that has one rank and one alpha for all its layers.

    Returns its shape. Raises RequestError for an update that is no product B A, RunError if the
    adapter does not read back as written.
    """
    pairs: dict[str, list[LoraUpdate]] = {}
    for layer, of_layer in updates.items():
        pairs[layer] = _addable(of_layer)
        if len(pairs[layer]) < len(of_layer):
            problem = f"{layer} has use_dora or modules_to_save, which such servers do not load"
            raise RequestError([f"--adapter_only: {problem}; merge into the base instead"])
    base = read_tokenizer_files(checkpoint.folder)

    # The rank has to hold all pairs of a layer side by side. Any alpha would do, since `_stack`
    # makes up for it in B; this one leaves the B with the largest factor nearly as it is.
    rank = max(sum(pair.rank for pair in of_layer) for of_layer in pairs.values())
    largest_factor = max(pair.factor for of_layer in pairs.values() for pair in of_layer)
    alpha = max(1, round(rank * largest_factor))
    changed_names = {layer.split(".")[-1] for layer in pairs}
    targets = tuple(name for name in checkpoint.shape.linear_shapes() if name in changed_names)
    lora = LoraShape(rank, alpha, 0.0, targets)

    # Targets are names of layers in every block. A layer that is not changed gets a pair of zeros.
    tensors: dict[str, Tensor] = {}
    for path, layer_shape in lora.layers(checkpoint.shape).items():
        a = torch.zeros(rank, layer_shape.in_features)
        b = torch.zeros(layer_shape.out_features, rank)
        _stack(pairs.get(path, []), a, b, scaling=alpha / rank)
        tensors[f"{path}.lora_A"] = a
        tensors[f"{path}.lora_B"] = b
    write_adapter(folder, tensors, lora, base)
    check_adapter(folder, tensors)
    return lora


def _stack(pairs: Sequence[LoraUpdate], a: Tensor, b: Tensor, scaling: float) -> None:
    """Fill `a` (R, in) and `b` (out, R) so that `scaling * b a` is the sum of the pairs' updates.

    B1 A1 + B2 A2 is the product of B1 and B2 side by side with A1 and A2 one above the other. What
    the pairs leave of R stays zero.
    """
    end = 0
    for pair in pairs:
        start = end
        end = start + pair.rank
        pair_a, pair_b = pair.read()
        a[start:end] = pair_a
        b[:, start:end] = pair_b * (pair.factor / scaling)
