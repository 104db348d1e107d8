"""Ways to break the weights of a checkpoint, and the words of the answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from minilora.files.weights import INDEX

NORM = "model.norm.weight"
Change = Callable[[Path], None]


def shard_of(folder: Path, name: str) -> Path:
    """The file that a tensor lies in, by the index."""
    weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    return folder / weight_map[name]


def remove(name: str) -> Change:
    """Delete a file of the folder."""
    return lambda folder: (folder / name).unlink()


def edit_index(change: Callable[[dict[str, str]], object]) -> Change:
    """Change which tensors the index puts where."""

    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    return edit


def replace_tensor(name: str, tensor: torch.Tensor) -> Change:
    """Put another tensor in the place of one."""

    def replace(folder: Path) -> None:
        file = shard_of(folder, name)
        save_file({**load_file(file), name: tensor}, file)

    return replace


def write_config(text: str) -> Change:
    """Let config.json hold this text."""

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(text, encoding="utf-8")

    return write


def lose_a_shard(folder: Path) -> None:
    shard_of(folder, NORM).unlink()


def truncate(folder: Path) -> None:
    file = shard_of(folder, NORM)
    file.write_bytes(file.read_bytes()[:-10])


def garbage(folder: Path) -> None:
    shard_of(folder, NORM).write_bytes(b"\xff" * 400)


def add_a_stranger(folder: Path) -> None:
    """A tensor that no Llama has, in a file and in the index."""
    file = shard_of(folder, NORM)
    save_file({**load_file(file), "model.layers.2.x": torch.zeros(1)}, file)
    edit_index(lambda index: index.update({"model.layers.2.x": file.name}))(folder)


# Name of a case -> how the folder is broken, and words that the answer must hold.
BROKEN: dict[str, tuple[Change, list[str]]] = {
    "no config": (remove("config.json"), ["config.json: no such file"]),
    "broken config": (write_config("{\n,}"), ["config.json:2: not JSON"]),
    "config is a list": (write_config("[]"), ["a JSON object is needed, not list"]),
    "not a llama": (write_config('{"model_type": "gpt2"}'), ["only `llama`"]),
    "no weights": (remove(INDEX), ["no model.safetensors and no model.safetensors.index.json"]),
    "shard missing": (lose_a_shard, ["no such file", "download it again"]),
    "truncated": (truncate, ["not a whole safetensors file", "download it again"]),
    "garbage": (garbage, ["not a whole safetensors file"]),
    "index points outside": (
        edit_index(lambda index: index.update({NORM: "../../etc/passwd"})),
        [NORM, "'../../etc/passwd', outside the folder"],
    ),
    "index points nowhere": (
        edit_index(lambda index: index.update({NORM: 7})),
        ["outside the folder"],
    ),
    "index lacks a tensor": (
        edit_index(lambda index: index.pop(NORM)),
        [NORM, "is here, but not in model.safetensors.index.json"],
    ),
    "index names another shard": (
        edit_index(lambda index: index.update({NORM: index["model.embed_tokens.weight"]})),
        [NORM, "is missing, though the index says"],
    ),
    "wrong shape": (
        replace_tensor(NORM, torch.zeros(31)),
        [NORM, "has shape [31], config.json implies [32]"],
    ),
    "wrong dtype": (
        replace_tensor(NORM, torch.zeros(32, dtype=torch.int8)),
        [NORM, "is I8; F32, BF16, F16 can be read"],
    ),
    "surplus": (add_a_stranger, ["model.layers.2.x is not part of a Llama"]),
}
