"""Adapters in PEFT's format: written whole or not at all, and checked after writing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from minilora.config import RequestError, RunError, shortened
from minilora.config.reading import read_json
from minilora.model.lora import LoraShape, resolve_targets
from minilora.model.shape import LlamaShape

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# What a tokenizer consists of; kept beside the adapter so that it serves what was trained.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def stored_name(parameter: str) -> str:
    """`model.layers.0.self_attn.q_proj.lora_A` as PEFT names it on disk."""
    return f"{PREFIX}{parameter}.weight"


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], lora: LoraShape, base: Path) -> None:
    """Write adapter_config.json, adapter_model.safetensors and the base's tokenizer files.

    tensors: parameter name to CPU tensor. Each file is renamed into place when it is whole, the
    weights before the config that makes the folder an adapter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {stored_name(name): tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(folder / WEIGHTS, save(named, metadata={"format": "pt"}))
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            write_atomically(folder / name, (base / name).read_bytes())
    config = json.dumps(_peft_config(lora, base), indent=2, sort_keys=True) + "\n"
    write_atomically(folder / CONFIG, config.encode())


def check_adapter(folder: Path, expected: Mapping[str, Tensor]) -> None:
    """Read the written file back. Raises RunError unless it holds what was meant, all finite."""
    try:
        held = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{folder / WEIGHTS} cannot be read back: {error}") from None
    wanted = {stored_name(name): tensor for name, tensor in expected.items()}
    if held.keys() != wanted.keys():
        raise RunError(f"{folder / WEIGHTS}: tensors {sorted(held.keys() ^ wanted.keys())} differ")
    for name, tensor in wanted.items():
        if not tensor.numel() or not tensor.isfinite().all():
            raise RunError(f"{folder / WEIGHTS}: {name} is empty or not finite")
        if not torch.equal(held[name], tensor):
            raise RunError(f"{folder / WEIGHTS}: {name} differs from what was trained")


def read_adapter_shape(folder: Path, model: LlamaShape, dropout: float) -> LoraShape:
    """Rank, alpha and targets of an adapter to continue from.

    Raises RequestError for what is not a plain LoRA over linear layers of a Llama.
    """
    config = read_json(folder / CONFIG)
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r}, not LORA")
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "use_rslora",
                "layers_to_transform", "layer_replication", "fan_in_fan_out"):  # fmt: skip
        if config.get(key):
            problems.append(f"{folder / CONFIG}: {key} = {config[key]!r} cannot be continued from")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        start = config["init_lora_weights"]
        problems.append(
            f"{folder / CONFIG}: init_lora_weights = {start!r} changes the base weights too; "
            "convert the adapter to plain LoRA with PEFT first"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        problems.append(f"{folder / CONFIG}: r is {rank!r}; a whole number of at least 1 is needed")
    if not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        problems.append(f"{folder / CONFIG}: lora_alpha is {alpha!r}; a positive number is needed")
    named = config.get("target_modules")
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        problems.append(f"{folder / CONFIG}: target_modules is {named!r}; a list is needed")
    if problems:
        raise RequestError(problems)
    assert isinstance(named, list) and rank is not None and alpha is not None
    targets = resolve_targets([name.split(".")[-1] for name in named], [*model.linear_shapes()])
    return LoraShape(rank, alpha, dropout, targets)


def read_adapter(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of an adapter by parameter name, in the dtype of the file.

    expected: parameter name to shape. Raises RequestError naming each tensor that is missing,
    surplus, of another shape or not finite.
    """
    try:
        held = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise RequestError([f"{folder / WEIGHTS}: no such file; no other format is read"]) from None
    except (SafetensorError, OSError) as error:
        raise RequestError([f"{folder / WEIGHTS}: not a whole safetensors file: {error}"]) from None
    wanted = {stored_name(name): shape for name, shape in expected.items()}
    where = folder / WEIGHTS
    problems = [f"{where}: {name} is missing" for name in sorted(wanted.keys() - held.keys())]
    problems += [f"{where}: {name} is not in the model" for name in sorted(held.keys() - wanted)]
    for name in sorted(held.keys() & wanted.keys()):
        if held[name].shape != wanted[name]:
            problems.append(
                f"{where}: {name} has shape {list(held[name].shape)}, "
                f"the model needs {list(wanted[name])}"
            )
        elif not held[name].isfinite().all():
            problems.append(f"{where}: {name} holds NaN or infinite numbers")
    if problems:
        raise RequestError(shortened(problems))
    return {name: held[stored_name(name)] for name in expected}


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that after a crash it is the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _peft_config(lora: LoraShape, base: Path) -> dict[str, Any]:
    """Only keys that PEFT 0.13 knows, the first of the format: older ones fail on a newer key."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(lora.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
