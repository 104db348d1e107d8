"""Adapters in PEFT's format: written whole or not at all, and checked after writing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from minilora.model.llama_shape import LlamaShape
from minilora.model.lora_shape import LoraShape
from minilora.settings.errors import RequestError, RunError, shortened
from minilora.settings.text_files import read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings of PEFT's under which a layer computes something else.
OTHER_METHODS = (
    *("use_qalora", "alora_invocation_tokens", "lora_bias", "fan_in_fan_out", "exclude_modules"),
    *("trainable_token_indices", "target_parameters", "layer_replication", "use_bdlora"),
    *("velora_config", "monteclora_config", "arrow_config", "kasa_config"),
)
# What a tokenizer consists of; kept beside the adapter so that it serves what was trained.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def stored_name(parameter: str) -> str:
    """`model.layers.0.self_attn.q_proj.lora_A`, or another parameter, as PEFT names it on disk."""
    return PREFIX + parameter + ".weight" * parameter.endswith((".lora_A", ".lora_B"))


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], lora: LoraShape, base: Path) -> None:
    """Write adapter_config.json, adapter_model.safetensors and the base's tokenizer files.

    tensors: parameter name to CPU tensor. Each file is renamed into place when it is whole, the
    weights before the config that makes the folder an adapter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {stored_name(name): tensor for name, tensor in tensors.items()}
    write_atomically(folder / WEIGHTS, save(named, metadata={"format": "pt"}))
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            write_atomically(folder / name, (base / name).read_bytes())
    # Not sorted: of the patterns that match a layer the first one counts.
    config = json.dumps(_peft_config(lora, base), indent=2) + "\n"
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
    """What an adapter adds to which layers. Raises RequestError for what is not read here."""
    config = read_json(folder / CONFIG)
    if problems := [*_config_problems(config)]:
        raise RequestError([f"{folder / CONFIG}: {problem}" for problem in problems])
    named, only = config["target_modules"], config.get("layers_to_transform")
    lora = LoraShape(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=dropout,
        targets=named if isinstance(named, str) else tuple(named),
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        modules_to_save=tuple(config.get("modules_to_save") or ()),
    )
    names = {"targets": "target_modules"}
    if problems := [f"{names.get(key, key)}: {text}" for key, text in lora.problems(model)]:
        raise RequestError([f"{folder / CONFIG}: {problem}" for problem in problems])
    if only:
        paths = tuple(path for path in lora.layers(model) if int(path.split(".")[2]) in only)
        if not paths:
            raise RequestError([f"{folder / CONFIG}: layers_to_transform = {only} names no layer"])
        lora = replace(lora, targets=paths)
    return lora


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What in an adapter_config.json is not LoRA as it is known here, or no value of its kind."""

    def positive(value: object, *kinds: type) -> bool:
        return type(value) in kinds and 0 < value < float("inf")  # type: ignore[operator]

    if config.get("peft_type") != "LORA":
        yield f"peft_type is {config.get('peft_type')!r}, not LORA"
    for key in OTHER_METHODS:
        if config.get(key):
            yield f"{key} = {config[key]!r} is not read here; LoRA, rsLoRA and DoRA are"
    if config.get("bias") not in (None, "none"):
        yield f"bias = {config['bias']!r}: trained biases are not read"
    start = config.get("init_lora_weights", True)
    if start not in (None, True, False, "gaussian", "eva", "orthogonal"):
        yield (f"init_lora_weights = {start!r} changes the base weights too; "
               "convert the adapter to plain LoRA with PEFT first")  # fmt: skip
    if not positive(config.get("r"), int):
        yield f"r is {config.get('r')!r}; a whole number of at least 1 is needed"
    if not positive(config.get("lora_alpha"), int, float):
        yield f"lora_alpha is {config.get('lora_alpha')!r}; a positive number is needed"
    for key, kinds in (("rank_pattern", (int,)), ("alpha_pattern", (int, float))):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(
            positive(v, *kinds) for v in patterns.values()
        ):
            yield f"{key} is {patterns!r}; positive numbers by pattern are needed"
    named = config.get("target_modules")
    if not isinstance(named, str) and not _is_list(named, str):
        yield f"target_modules is {named!r}; a list or a regular expression is needed"
    for key, kind in (("modules_to_save", str), ("layers_to_transform", int)):
        if config.get(key) is not None and not _is_list(config[key], kind):
            yield f"{key} is {config[key]!r}; a list is needed"


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(part) is kind for part in value)


def read_adapter(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of an adapter by parameter name, in the dtype of the file.

    expected: parameter name to shape. Raises RequestError as `check_tensors` does.
    """
    check_tensors(folder, expected)
    held = load_file(folder / WEIGHTS)
    return {name: held[stored_name(name)] for name in expected}


def check_tensors(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Look at an adapter's tensors one after another.

    expected: parameter name to shape. Raises RequestError naming each tensor that is missing,
    surplus, of another shape or not finite.
    """
    where, problems = folder / WEIGHTS, []
    wanted = {stored_name(name): shape for name, shape in expected.items()}
    try:
        with safe_open(where, framework="pt") as opened:
            held = set(opened.keys())
            for name in sorted(held & wanted.keys()):
                tensor = opened.get_tensor(name)
                if tensor.shape != wanted[name]:
                    shapes = f"{list(tensor.shape)}, the model needs {list(wanted[name])}"
                    problems.append(f"{name} has shape {shapes}")
                elif not tensor.isfinite().all():
                    problems.append(f"{name} holds NaN or infinite numbers")
    except FileNotFoundError:
        raise RequestError([f"{where}: no such file; no other format is read"]) from None
    except (SafetensorError, OSError) as error:
        raise RequestError([f"{where}: not a whole safetensors file: {error}"]) from None
    problems += [f"{name} is missing" for name in sorted(wanted.keys() - held)]
    problems += [f"{name} is not in the model" for name in sorted(held - wanted.keys())]
    if problems:
        raise RequestError(shortened([f"{where}: {problem}" for problem in problems]))


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
        "alpha_pattern": dict(lora.alpha_pattern),
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
        "modules_to_save": list(lora.modules_to_save) or None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": dict(lora.rank_pattern),
        "revision": None,
        "target_modules": lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    }
