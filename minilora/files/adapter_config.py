"""adapter_config.json: an adapter's shape in the keys of PEFT, written and read."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minilora.model.llama_shape import LlamaShape
from minilora.model.lora_shape import LoraShape
from minilora.settings.errors import RequestError
from minilora.settings.text_files import read_json

CONFIG = "adapter_config.json"
# Keys of PEFT's LoraConfig under which a layer computes something else than LoRA as it is known
# here. An adapter in which one of them is set is refused.
OTHER_METHODS = (
    "use_qalora",
    "alora_invocation_tokens",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
)
ALL_LINEAR = "all-linear"  # as target_modules: every linear layer but the head
# Values of init_lora_weights that only choose where A and B start. Others, such as pissa, also
# change the base weights, so that the adapter is of no use with the base as it was published.
HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def peft_config(lora: LoraShape, base: Path, layers: Sequence[str]) -> dict[str, Any]:
    """The content of adapter_config.json, with the keys of PEFT 0.13.

    Later releases read a file that lacks their newer keys, while an older PEFT fails on a key that
    it does not know.

    base: the folder of the base model. It is written as an absolute path, because a relative one
    is right from one folder only. layers: the path of each layer that has a pair. They stand for a
    regular expression: PEFT's add_weighted_adapter mixes lists with lists only.
    """
    targets = layers if isinstance(lora.targets, str) else lora.targets
    return {
        "alpha_pattern": dict(lora.alpha_pattern),
        "auto_mapping": None,
        "base_model_name_or_path": os.path.abspath(base),
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
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    }


def read_adapter_shape(folder: Path, model: LlamaShape, dropout: float) -> LoraShape:
    """Read from adapter_config.json what an adapter adds to which layers.

    dropout: of the run that continues the adapter; the one in the file is not used.
    Raises RequestError naming every key that is not read here or does not fit the model.
    """
    path = folder / CONFIG
    config = read_json(path)
    problems = [*_method_problems(config, model), *_value_problems(config)]
    if problems:
        raise RequestError([f"{path}: {problem}" for problem in problems])

    targets = config["target_modules"]
    if targets == ALL_LINEAR:
        targets = list(model.linear_shapes())
    lora = LoraShape(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=dropout,
        targets=targets if isinstance(targets, str) else tuple(targets),
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        modules_to_save=tuple(config.get("modules_to_save") or ()),
    )
    pefts_names = {"targets": "target_modules"}
    problems = [f"{pefts_names.get(key, key)}: {text}" for key, text in lora.problems(model)]
    if problems:
        raise RequestError([f"{path}: {problem}" for problem in problems])

    # LoraShape has no field for a choice of layers: instead they are named one by one.
    blocks, excluded = config.get("layers_to_transform"), config.get("exclude_modules")
    if type(blocks) is int:
        blocks = [blocks]
    if not blocks and not excluded:
        return lora
    paths = tuple(
        layer
        for layer in lora.layers(model)
        if (not blocks or _block_of(layer) in blocks) and not _is_excluded(layer, excluded)
    )
    if not paths:
        choice = f"layers_to_transform = {blocks}" if blocks else f"exclude_modules = {excluded!r}"
        raise RequestError([f"{path}: {choice} leaves no layer"])
    return replace(lora, targets=paths)


def _is_excluded(layer: str, excluded: str | list[str] | None) -> bool:
    """Whether PEFT leaves a layer out: an expression for whole paths, or ends of paths."""
    if isinstance(excluded, str):
        return re.fullmatch(excluded, layer) is not None
    return any(layer == name or layer.endswith(f".{name}") for name in excluded or ())


def _block_of(layer: str) -> int:
    """The number of the block that a layer is part of: 3 for `model.layers.3.mlp.up_proj`."""
    return int(layer.split(".")[2])


def _method_problems(config: Mapping[str, Any], model: LlamaShape) -> Iterator[str]:
    """What in an adapter_config.json asks for something else than LoRA as it is known here."""
    if config.get("peft_type") != "LORA":
        yield f"peft_type is {config.get('peft_type')!r}, not LORA"
    for key in OTHER_METHODS:
        if config.get(key):
            yield f"{key} = {config[key]!r} is not read here; LoRA, rsLoRA and DoRA are"
    # In a model without biases there is none to train, whatever the key says.
    has_biases = any(name.endswith(".bias") for name in model.parameter_shapes())
    if config.get("bias") not in (None, "none", *(() if has_biases else ("all", "lora_only"))):
        yield f"bias = {config['bias']!r}: trained biases are not read"
    if config.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        yield f"layers_pattern = {config['layers_pattern']!r}: Llama's blocks are called `layers`"
    start = config.get("init_lora_weights", True)
    if start not in HARMLESS_STARTS:
        yield (
            f"init_lora_weights = {start!r} changes the base weights too; "
            "convert the adapter to plain LoRA with PEFT first"
        )


def _value_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Which values of an adapter_config.json are not of the kind that their keys need."""
    if not _is_positive(config.get("r"), int):
        yield f"r is {config.get('r')!r}; a whole number of at least 1 is needed"
    if not _is_positive(config.get("lora_alpha"), int, float):
        yield f"lora_alpha is {config.get('lora_alpha')!r}; a positive number is needed"

    number_types: dict[str, tuple[type, ...]] = {
        "rank_pattern": (int,),
        "alpha_pattern": (int, float),
    }
    for key, types in number_types.items():
        patterns = config.get(key) or {}
        is_mapping = isinstance(patterns, dict)
        if not is_mapping or not all(_is_positive(value, *types) for value in patterns.values()):
            yield f"{key} is {patterns!r}; positive numbers by pattern are needed"

    targets = config.get("target_modules")
    if not isinstance(targets, str) and not _is_list(targets, str):
        yield f"target_modules is {targets!r}; a list or a regular expression is needed"
    # As in PEFT one number stands for a list of one.
    one_or_list: dict[str, type] = {"layers_to_transform": int, "exclude_modules": str}
    for key, item_type in {"modules_to_save": str, **one_or_list}.items():
        value = config.get(key)
        is_one = key in one_or_list and type(value) is item_type
        if value is not None and not is_one and not _is_list(value, item_type):
            yield f"{key} is {value!r}; a list is needed"
    if isinstance(config.get("exclude_modules"), str):
        try:
            re.compile(config["exclude_modules"])
        except (re.error, RecursionError, OverflowError) as error:
            yield f"exclude_modules is {config['exclude_modules']!r}: no expression: {error}"


def _is_positive(value: object, *types: type) -> bool:
    """Whether it is a positive number of one of these types that a float can hold."""
    return type(value) in types and 0 < value <= sys.float_info.max  # type: ignore[operator]


def _is_list(value: object, item_type: type) -> bool:
    return isinstance(value, list) and all(type(item) is item_type for item in value)
