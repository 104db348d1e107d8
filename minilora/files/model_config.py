"""config.json of a checkpoint: read once, and turned into the shape of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.model.llama_shape import LlamaShape, Rope
from minilora.settings.errors import RequestError
from minilora.settings.text_files import read_json


@dataclass(frozen=True)
class ModelConfig:
    """A checkpoint's config.json: the folder it lies in, its values, and the shape they mean."""

    folder: Path
    values: Mapping[str, Any]
    shape: LlamaShape


def read_model_config(folder: Path) -> ModelConfig:
    """Read config.json. Raises RequestError naming every key that cannot be used."""
    if not folder.is_dir():
        problem = "no such folder; download the model, and name its folder"
        raise RequestError([f"model_name_or_path: {folder}: {problem}"])
    path = folder / "config.json"
    values = read_json(path)
    return ModelConfig(folder, values, shape_from_config(values, str(path)))


def shape_from_config(config: Mapping[str, Any], where: str = "config.json") -> LlamaShape:
    """Read the shape from a parsed config.json, in the hub's form or transformers 5's.

    Raises RequestError naming every key that is missing, wrong or asks for another model.
    """
    read = _Reader(config, where)
    if config.get("model_type") != "llama":
        read.problem(
            "model_type",
            config.get("model_type"),
            "only `llama` text models are trained",
        )
    if config.get("hidden_act", "silu") != "silu":
        read.problem("hidden_act", config["hidden_act"], "Llama uses `silu`")
    heads = read.whole("num_attention_heads")
    hidden = read.whole("hidden_size")
    kv_heads = read.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        read.problem("num_key_value_heads", kv_heads, f"must divide {heads} attention heads")
    head_dim = read.whole("head_dim", max(hidden // heads, 1))
    if head_dim % 2:
        read.problem("head_dim", head_dim, "rotary embedding needs an even size")
    shape = LlamaShape(
        vocab_size=read.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.whole("intermediate_size"),
        num_layers=read.whole("num_hidden_layers", most=10_000),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=read.number("rms_norm_eps", 1e-6),
        rope=_read_rope(read),
        tied=read.flag("tie_word_embeddings"),
        attention_bias=read.flag("attention_bias"),
        mlp_bias=read.flag("mlp_bias"),
        max_positions=_positions(config),
    )
    if read.problems:
        raise RequestError(read.problems)
    return shape


def _positions(config: Mapping[str, Any]) -> int | None:
    """max_position_embeddings where it is a number: it only serves warnings."""
    value = config.get("max_position_embeddings")
    return value if type(value) is int else None


class _Reader:
    """Takes typed values out of a parsed JSON object and remembers every problem."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where
        self.problems: list[str] = []

    def problem(self, key: str, value: object, remedy: str) -> None:
        self.problems.append(f"{self.where}: {key} is {value!r}: {remedy}")

    def whole(self, key: str, default: int | None = None, most: int = 10**9) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= most:
            self.problem(key, value, f"a whole number from 1 to {most} is needed")
            return 1
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, int | float) and value is not True and 0 < value < float("inf"):
            return float(value)
        self.problem(key, value, "a positive number is needed")
        return 1.0

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value not in (None, True, False):
            self.problem(key, value, "true or false is needed")
        return bool(value)


def _read_rope(read: _Reader) -> Rope:
    """Read rope_theta and rope_scaling, or transformers 5's rope_parameters which holds both."""
    key = "rope_parameters" if read.values.get("rope_parameters") else "rope_scaling"
    scaling = read.values.get(key) or {}
    if not isinstance(scaling, Mapping):
        read.problem(key, scaling, "an object is needed")
        scaling = {}
    inner = _Reader(scaling, f"{read.where}: {key}")
    inner.problems = read.problems
    holder = inner if "rope_theta" in scaling else read
    theta = holder.number("rope_theta", 10000.0)  # the default of transformers' LlamaConfig
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind != "llama3":
        inner.problem("rope_type", kind, "`default` and `llama3` are known")
        return Rope(theta)
    rope = Rope(
        theta,
        inner.number("factor"),
        inner.number("low_freq_factor"),
        inner.number("high_freq_factor"),
        inner.whole("original_max_position_embeddings"),
    )
    if rope.high_freq_factor <= rope.low_freq_factor:
        inner.problem("high_freq_factor", rope.high_freq_factor, "must exceed low_freq_factor")
    return rope
