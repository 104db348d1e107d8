"""config.json of a checkpoint: read once, and turned into the shape of the model."""

from __future__ import annotations

import sys
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


def read_model_config(folder: Path, quantization_bit: int | None = None) -> ModelConfig:
    """Read config.json. Raises RequestError naming every key that cannot be used.

    quantization_bit: the setting; the shape then says that the linear layers are held packed.
    """
    if not folder.is_dir():
        problem = "no such folder; download the model, and name its folder"
        raise RequestError([f"model_name_or_path: {folder}: {problem}"])
    path = folder / "config.json"
    values = read_json(path)
    shape = shape_from_config(values, str(path)).in_bits(quantization_bit)
    return ModelConfig(folder, values, shape)


def shape_from_config(config: Mapping[str, Any], where: str = "config.json") -> LlamaShape:
    """Read the shape from a parsed config.json, as the hub's files or transformers 5 write it.

    where: the file's name in messages. Raises RequestError naming every key that is missing, wrong
    or asks for another model. The defaults are those of transformers' LlamaConfig.
    """
    reader = _Reader(config, where)
    model_type = config.get("model_type")
    if model_type != "llama":
        reader.add_problem("model_type", model_type, "only `llama` text models are trained")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        reader.add_problem("hidden_act", activation, "Llama uses `silu`")

    num_heads = reader.whole_number("num_attention_heads")
    hidden_size = reader.whole_number("hidden_size")
    num_kv_heads = reader.whole_number("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        remedy = f"must divide {num_heads} attention heads"
        reader.add_problem("num_key_value_heads", num_kv_heads, remedy)
    head_dim = reader.whole_number("head_dim", max(hidden_size // num_heads, 1))
    if head_dim % 2:
        reader.add_problem("head_dim", head_dim, "rotary embedding needs an even size")

    shape = LlamaShape(
        vocab_size=reader.whole_number("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.whole_number("intermediate_size"),
        # The names of all parameters are listed before a weight file is opened, hence the limit.
        num_layers=reader.whole_number("num_hidden_layers", most=10_000),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=reader.positive_number("rms_norm_eps", 1e-6),
        rope=_read_rope(reader),
        tied=reader.flag("tie_word_embeddings"),
        attention_bias=reader.flag("attention_bias"),
        mlp_bias=reader.flag("mlp_bias"),
        max_positions=_max_positions(config),
    )
    if reader.problems:
        raise RequestError(reader.problems)
    return shape


def _max_positions(config: Mapping[str, Any]) -> int | None:
    """max_position_embeddings, or None where it is no number: it is used for a warning only."""
    value = config.get("max_position_embeddings")
    return value if type(value) is int else None


class _Reader:
    """Takes typed values out of a parsed JSON object, and collects what is wrong with them.

    A value that is wrong is replaced by one that can be computed with, so that reading goes on and
    all problems are found; whoever reads must look at `problems` at the end.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where
        self.problems: list[str] = []

    def add_problem(self, key: str, value: object, remedy: str) -> None:
        self.problems.append(f"{self.where}: {key} is {value!r}: {remedy}")

    def whole_number(self, key: str, default: int | None = None, most: int = 10**9) -> int:
        """A number from 1 to `most`. A key that is null or not there means the default."""
        value = self.values.get(key)
        if value is None:
            value = default
        if type(value) is not int or not 1 <= value <= most:
            self.add_problem(key, value, f"a whole number from 1 to {most} is needed")
            return 1
        return value

    def positive_number(self, key: str, default: float | None = None) -> float:
        """A number above 0. A key that is null or not there means the default."""
        value = self.values.get(key)
        if value is None:
            value = default
        # Python reads NaN and Infinity from JSON, whole numbers that no float can hold, and true,
        # which counts as 1.
        if isinstance(value, int | float) and value is not True:
            if 0 < value <= sys.float_info.max:
                return float(value)
        self.add_problem(key, value, "a positive number is needed")
        return 1.0

    def flag(self, key: str) -> bool:
        """True or false; a key that is null or not there means false."""
        value = self.values.get(key)
        if value not in (None, True, False):
            self.add_problem(key, value, "true or false is needed")
        return bool(value)


def _read_rope(reader: _Reader) -> Rope:
    """Read rope_theta and rope_scaling, or rope_parameters, in which transformers 5 has both."""
    key = "rope_parameters" if reader.values.get("rope_parameters") else "rope_scaling"
    scaling = reader.values.get(key) or {}
    if not isinstance(scaling, Mapping):
        reader.add_problem(key, scaling, "an object is needed")
        scaling = {}
    inner = _Reader(scaling, f"{reader.where}: {key}")
    inner.problems = reader.problems

    theta_reader = inner if "rope_theta" in scaling else reader
    theta = theta_reader.positive_number("rope_theta", 10000.0)
    # Older files say `type`.
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type == "default":
        return Rope(theta)
    if rope_type != "llama3":
        inner.add_problem("rope_type", rope_type, "`default` and `llama3` are known")
        return Rope(theta)

    rope = Rope(
        theta,
        factor=inner.positive_number("factor"),
        low_freq_factor=inner.positive_number("low_freq_factor"),
        high_freq_factor=inner.positive_number("high_freq_factor"),
        original_max_position=inner.whole_number("original_max_position_embeddings"),
    )
    if rope.high_freq_factor <= rope.low_freq_factor:
        remedy = "must exceed low_freq_factor"
        inner.add_problem("high_freq_factor", rope.high_freq_factor, remedy)
    return rope
