"""Adapters written into the base's weights, or as one adapter, for programs that serve models."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minilora.config import RequestError, RunError
from minilora.config.reading import read_json
from minilora.files.adapter import CONFIG, WEIGHTS, check_adapter, stored_name, write_adapter
from minilora.files.weights import INDEX, SINGLE, Checkpoint, StoredTensor
from minilora.model.lora import LoraShape
from minilora.model.shape import LlamaShape

CHUNK = 2**22  # bytes of a file in memory at a time
# Settings of PEFT's under which a layer computes something else, and those that must be so.
OTHER_METHODS = (
    *("use_dora", "use_qalora", "alora_invocation_tokens", "lora_bias", "fan_in_fan_out"),
    *("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"),
)
PLAIN = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    # Other starts, such as pissa, change the base weights.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
# What lies beside weights and is not theirs: weights in other formats, other adapters.
NOT_COPIED = re.compile(r".*\.(safetensors|bin|pth|pt|gguf)|.*\.bin\.index\.json|adapter_.*")


@dataclass(frozen=True)
class Pair:
    """The update factor * B A of one layer; A (rank, in) and B (out, rank) lie in `file`."""

    file: Path
    layer: str
    rank: int
    factor: float

    @property
    def names(self) -> tuple[str, str]:
        return stored_name(f"{self.layer}.lora_A"), stored_name(f"{self.layer}.lora_B")

    def read(self) -> tuple[Tensor, Tensor]:
        """A and B in fp32."""
        with safe_open(self.file, framework="pt") as opened:
            a, b = map(opened.get_tensor, self.names)
        return a.float(), b.float()


Updates = Mapping[str, Sequence[Pair]]  # by layer, such as model.layers.0.self_attn.q_proj


def linear_layers(model: LlamaShape) -> dict[str, tuple[int, int]]:
    """Every layer that LoRA can change, with its (out, in)."""
    known = model.linear_shapes()
    names = [name.removesuffix(".weight") for name in model.parameter_shapes()]
    return {name: known[name.split(".")[-1]] for name in names if name.split(".")[-1] in known}


def read_updates(folder: Path, weight: float, model: LlamaShape) -> dict[str, Pair]:
    """The pairs of an adapter by layer, their factors times `weight`.

    Rank and alpha may differ by layer. Raises RequestError with every setting that is not plain
    LoRA and every tensor that is missing, surplus, of another shape or not finite.
    """
    where = folder / WEIGHTS
    config = _plain_lora(folder / CONFIG)
    pairs: dict[str, Pair] = {}
    expected: dict[str, tuple[int, int]] = {}
    for layer, (rows, columns) in linear_layers(model).items():
        rank = _of_layer(config, "rank_pattern", "r", layer)
        alpha = _of_layer(config, "alpha_pattern", "lora_alpha", layer)
        if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
            problem = f"{layer} has r {rank!r} and lora_alpha {alpha!r}; numbers are needed"
            raise RequestError([f"{folder / CONFIG}: {problem}"])
        factor = weight * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        pairs[layer] = Pair(where, layer, rank, factor)
        expected[pairs[layer].names[0]] = (rank, columns)
        expected[pairs[layer].names[1]] = (rows, rank)
    try:
        with safe_open(where, framework="pt") as opened:
            held = set(opened.keys())
            problems = [f"{name} is not in the model" for name in held - expected.keys()]
            for name in held & expected.keys():
                tensor = opened.get_tensor(name)
                if tensor.shape != expected[name]:
                    shapes = f"{list(tensor.shape)}, not {list(expected[name])}"
                    problems.append(f"{name} has shape {shapes}")
                elif not tensor.isfinite().all():
                    problems.append(f"{name} holds NaN or infinite numbers")
    except (SafetensorError, OSError) as error:
        raise RequestError([f"{where}: not a whole safetensors file: {error}"]) from None
    pairs = {layer: pair for layer, pair in pairs.items() if held.intersection(pair.names)}
    missing = {name for pair in pairs.values() for name in pair.names} - held
    problems += [f"{name} is missing" for name in missing]
    if problems or not pairs:
        raise RequestError([f"{where}: {line}" for line in sorted(problems) or ["no LoRA pair"]])
    return pairs


def _plain_lora(path: Path) -> dict[str, Any]:
    """An adapter_config.json. Raises RequestError for what is more than W x + factor * B A x."""
    config = read_json(path)
    strange = [key for key in OTHER_METHODS if config.get(key)]
    strange += [key for key, known in PLAIN.items() if config.get(key) not in known]
    if strange:
        raise RequestError([f"{path}: {key} = {config.get(key)!r} is not plain LoRA, which alone "
                            "can be merged" for key in strange])  # fmt: skip
    return config


def _of_layer(config: Mapping[str, Any], patterns: str, default: str, layer: str) -> Any:
    """The first pattern that matches the end of the layer's path, as in PEFT's get_pattern_key."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return config.get(default)


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


def _merged(file: Path, changed: Sequence[tuple[StoredTensor, Sequence[Pair]]]) -> Iterator[bytes]:
    """The bytes of a weight file, header and all; only numbers of changed tensors differ."""
    with file.open("rb") as opened:
        for stored, pairs in sorted(changed, key=lambda item: item[0].start):
            yield from _copied(opened, stored.start - opened.tell())
            rows, columns = stored.shape
            step = max(1, CHUNK // (columns * stored.dtype.itemsize))
            factors = [(pair.factor, *pair.read()) for pair in pairs]
            for first in range(0, rows, step):
                count = min(step, rows - first) * columns
                data = bytearray(opened.read(count * stored.dtype.itemsize))
                merged = torch.frombuffer(data, dtype=stored.dtype).view(-1, columns).float()
                for factor, a, b in factors:
                    merged.addmm_(b[first : first + step], a, alpha=factor)
                rounded = merged.to(stored.dtype)
                if not rounded.isfinite().all():
                    raise RunError(f"{pairs[0].layer}: not finite in {stored.dtype} once merged")
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
    one alpha / rank does not scale is scaled in B. Raises RunError if it does not read back.
    """
    rank = max(sum(pair.rank for pair in pairs) for pairs in updates.values())
    largest = max(pair.factor for pairs in updates.values() for pair in pairs)
    alpha = max(1, round(rank * largest))
    names = {layer.split(".")[-1] for layer in updates}
    targets = tuple(name for name in checkpoint.shape.linear_shapes() if name in names)
    lora = LoraShape(rank, alpha, 0.0, targets)
    tensors: dict[str, Tensor] = {}
    for layer, (rows, columns) in linear_layers(checkpoint.shape).items():
        if layer.split(".")[-1] not in targets:
            continue
        a, b, end = torch.zeros(rank, columns), torch.zeros(rows, rank), 0
        for pair in updates.get(layer, ()):
            start, end = end, end + pair.rank
            a[start:end], b[:, start:end] = pair.read()
            b[:, start:end] *= pair.factor / lora.scaling
        tensors |= {f"{layer}.lora_A": a, f"{layer}.lora_B": b}
    write_adapter(folder, tensors, lora, checkpoint.folder)
    check_adapter(folder, tensors)
    return lora
