"""config.json of a checkpoint: read once, and turned into the shape of the model."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.files.model_families import FAMILIES, Family, why_refused
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
    _refuse_quantized(values, path)
    shape = shape_from_config(values, str(path)).in_bits(quantization_bit)
    return ModelConfig(folder, values, shape)


def _refuse_quantized(values: Mapping[str, Any], path: Path) -> None:
    """Raise RequestError, in one line, for weights that are packed: none of them could be read."""
    # The keys of transformers, of compressed-tensors before it, and of MLX.
    for key in ("quantization_config", "compression_config", "quantization"):
        asked = values.get(key)
        if asked:
            method = asked.get("quant_method") if isinstance(asked, dict) else None
            kind = f" ({method})" if isinstance(method, str) else ""
            raise RequestError(
                [
                    f"{path}: {key}: the weights are quantized{kind}, and only bf16, fp16 and fp32 "
                    "can be read; name the folder of the model that they were quantized from"
                ]
            )


def shape_from_config(config: Mapping[str, Any], where: str = "config.json") -> LlamaShape:
    """Read the shape from a parsed config.json, as the hub's files or transformers 5 write it.

    where: the file's name in messages. Raises RequestError naming every key that is missing, wrong
    or asks for another model. The defaults are those of transformers' configuration classes.
    """
    reader = _Reader(config, where)
    family = _read_family(reader)
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        reader.add_problem("hidden_act", activation, "only `silu` is known")

    num_heads = reader.whole_number("num_attention_heads")
    hidden_size = reader.whole_number("hidden_size")
    # A key with null means as many as queries; without the key it is what the family has.
    kv_default = num_heads
    if family.kv_heads is not None and "num_key_value_heads" not in config:
        kv_default = family.kv_heads
    num_kv_heads = reader.whole_number("num_key_value_heads", kv_default)
    if num_heads % num_kv_heads:
        remedy = f"must divide {num_heads} attention heads"
        reader.add_problem("num_key_value_heads", num_kv_heads, remedy)
    head_default = family.head_dim or max(hidden_size // num_heads, 1)
    head_dim = reader.whole_number("head_dim", head_default)
    if head_dim % 2:
        reader.add_problem("head_dim", head_dim, "rotary embedding needs an even size")

    rope = _read_rope(reader)
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
        rope=rope,
        tied=reader.flag("tie_word_embeddings"),
        biased=_read_biased(reader, family),
        qk_norm=family.qk_norm,
        max_positions=_max_positions(config, rope),
        window=_read_window(reader, family),
    )
    if reader.problems:
        raise RequestError(reader.problems)
    return shape


def _max_positions(config: Mapping[str, Any], rope: Rope) -> int | None:
    """max_position_embeddings, or None where it is no number: it is used for a warning only.

    Whoever sets yarn for long documents, as Qwen's notes say, leaves that key as it is.
    """
    value = config.get("max_position_embeddings")
    if type(value) is not int:
        return None
    if rope.kind == "yarn":
        return max(value, int(rope.original_max_position * rope.factor))
    return value


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


def _read_family(reader: _Reader) -> Family:
    """The family of the model_type; Llama's where it is refused, so that reading goes on."""
    model_type = reader.values.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    has_images = "vision_config" in reader.values
    reader.add_problem("model_type", model_type, why_refused(model_type, has_images))
    return FAMILIES["llama"]


def _read_biased(reader: _Reader, family: Family) -> tuple[str, ...]:
    """The linear layers of a block that have a bias."""
    biased = family.biased
    for key, layers in family.bias_flags.items():
        if reader.flag(key):
            biased += layers
    return biased


def _read_window(reader: _Reader, family: Family) -> int | None:
    """How many tokens attention sees, None for all: of every layer, if that of one is limited."""
    kinds = reader.values.get("layer_types") or []
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        reader.add_problem("layer_types", kinds, f"only {' and '.join(known)} are known")
    if not family.has_window or (family.window_flag and not reader.flag(family.window_flag)):
        return None
    # As in transformers, null means no window, and a file without the key the usual one.
    if reader.values.get("sliding_window", family.window) is None:
        return None
    return reader.whole_number("sliding_window", family.window)


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
    part = scaling.get("partial_rotary_factor", reader.values.get("partial_rotary_factor"))
    if part not in (None, 1):
        inner.add_problem("partial_rotary_factor", part, "only whole heads are rotated here")
    # Older files say `type`.
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    match kind:
        case "default":
            return Rope(theta)
        case "linear":
            return Rope(theta, kind, factor=inner.positive_number("factor"))
        case "llama3":
            rope = Rope(
                theta,
                kind,
                factor=inner.positive_number("factor"),
                low_freq_factor=inner.positive_number("low_freq_factor"),
                high_freq_factor=inner.positive_number("high_freq_factor"),
                original_max_position=inner.whole_number("original_max_position_embeddings"),
            )
            if rope.high_freq_factor <= rope.low_freq_factor:
                remedy = "must exceed low_freq_factor"
                inner.add_problem("high_freq_factor", rope.high_freq_factor, remedy)
            return rope
        case "yarn":
            return _read_yarn(reader, inner, theta)
    known = "`default`, `linear`, `llama3` and `yarn` are known"
    inner.add_problem("rope_type", kind, known)
    return Rope(theta)


def _read_yarn(reader: _Reader, inner: _Reader, theta: float) -> Rope:
    """Scaling of kind yarn, as in Qwen's notes on long documents; defaults are transformers'."""
    for key, usual_values in (("mscale", ()), ("mscale_all_dim", ()), ("truncate", (True,))):
        value = inner.values.get(key)
        if value is not None and value not in usual_values:
            inner.add_problem(key, value, "not known; no file of Qwen or Mistral has it")
    factor = inner.positive_number("factor")
    if inner.values.get("original_max_position_embeddings") is None:
        original = reader.whole_number("max_position_embeddings")
    else:
        original = inner.whole_number("original_max_position_embeddings")
    # Peng et al. 2023, equation 22: attention is made sharper as the context grows.
    usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return Rope(
        theta,
        "yarn",
        factor=factor,
        low_freq_factor=inner.positive_number("beta_slow", 1.0),
        high_freq_factor=inner.positive_number("beta_fast", 32.0),
        original_max_position=original,
        attention_factor=inner.positive_number("attention_factor", usual),
    )
