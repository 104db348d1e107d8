"""What a Llama's config.json says about its shape, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minilora.settings.errors import RequestError


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: the base, and Llama 3.1's scaling of it where the file asks for that.

    `factor`, `low_freq_factor`, `high_freq_factor` and `original_max_position` are the keys of
    `rope_scaling` with `rope_type: llama3`; `factor` 1.0 means no scaling (Llama 3).
    """

    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama: everything that its parameters and its arithmetic depend on."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @staticmethod
    def from_config(config: Mapping[str, Any], where: str = "config.json") -> LlamaShape:
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
        )
        if read.problems:
            raise RequestError(read.problems)
        return shape

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block by their last name, each as (out, in)."""
        queries, keys = (
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )
        return {
            "q_proj": (queries, self.hidden_size),
            "k_proj": (keys, self.hidden_size),
            "v_proj": (keys, self.hidden_size),
            "o_proj": (self.hidden_size, queries),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """The linear layers of all blocks by their paths, each as (out, in)."""
        return {
            f"model.layers.{layer}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}": size
            for layer in range(self.num_layers)
            for name, size in self.linear_shapes().items()
        }

    @property
    def matrices(self) -> int:
        """Elements of all matrices that a token is multiplied with: the blocks' and the head."""
        block = sum(rows * columns for rows, columns in self.linear_shapes().values())
        return self.num_layers * block + self.vocab_size * self.hidden_size

    @property
    def even_length(self) -> float:
        """Tokens of a document at which attention costs as many FLOPs as the matrices do.

        Per token, forward and backward: 4 for each element of a frozen matrix; 7 for each query
        feature and token of the document (2 products forward, 5 back, over half of the square).
        """
        return 4 * self.matrices / (7 * self.num_layers * self.num_heads * self.head_dim)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint by its name in the files, in the files' order."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size)
        }
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            shapes[prefix + "input_layernorm.weight"] = (self.hidden_size,)
            for name, (rows, columns) in self.linear_shapes().items():
                parent = "self_attn" if name[0] in "qkvo" else "mlp"
                shapes[f"{prefix}{parent}.{name}.weight"] = (rows, columns)
                if self.attention_bias if parent == "self_attn" else self.mlp_bias:
                    shapes[f"{prefix}{parent}.{name}.bias"] = (rows,)
            shapes[prefix + "post_attention_layernorm.weight"] = (self.hidden_size,)
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes


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
