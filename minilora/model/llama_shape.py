"""What a model is made of, and what follows from it: arithmetic, without torch or files.

Llama 3, Qwen2, Qwen2.5, Qwen3 and Mistral are one model: their blocks differ in which linear layers
have a bias, in whether queries and keys are normed, and in sizes. A `LlamaShape` says all of that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from minilora.model.nf4_shape import packed_shapes


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: the base, and how its frequencies are scaled for longer documents.

    kind: the `rope_type` of config.json: default (no scaling), linear, llama3 or yarn.
    factor, low_freq_factor, high_freq_factor, original_max_position: the keys of `rope_scaling`
    with `rope_type: llama3`. For yarn the two in the middle are its `beta_slow` and `beta_fast`.
    attention_factor: what yarn multiplies cos and sin with.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    attention_factor: float = 1.0


class Held(NamedTuple):
    """A parameter as it is held in memory: its elements, and the bytes of each."""

    elements: int
    itemsize: int

    @property
    def bytes(self) -> int:
        return self.elements * self.itemsize


@dataclass(frozen=True)
class LlamaShape:
    """Everything that a model's parameters and its arithmetic depend on.

    num_kv_heads: heads of keys and values, each shared by num_heads / num_kv_heads heads of
    queries. tied: whether the head is the embedding table. biased: the linear layers of a block
    that have a bias, by their last names. qk_norm: whether each head of queries and of keys is
    normed before it is rotated. max_positions: the longest document that the checkpoint was
    trained for, in tokens, or None where config.json does not say. It limits nothing here; longer
    documents get a warning. window: how many tokens attention sees, the token itself included, or
    None for all before it. There is no code for windows: no document may be longer.
    packed: whether the linear layers of the blocks are held in memory in 4 bits (see nf4.py); the
    files are the same.
    """

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
    biased: tuple[str, ...] = ()
    qk_norm: bool = False
    max_positions: int | None = None
    window: int | None = None
    packed: bool = False

    def in_bits(self, quantization_bit: int | None) -> LlamaShape:
        """The same model with its linear layers held in 4 bits, or as they are with None.

        Raises RequestError naming the layers whose rows do not divide into blocks of 64 weights.
        """
        if quantization_bit is None:
            return self
        assert quantization_bit == 4, "checked with the settings"
        packed_shapes(self.linear_shapes())
        return replace(self, packed=True)

    @property
    def query_features(self) -> int:
        """Features of all query heads together: not always hidden_size."""
        return self.num_heads * self.head_dim

    @property
    def key_features(self) -> int:
        """Features of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block by their last name, each as (out, in)."""
        return {
            "q_proj": (self.query_features, self.hidden_size),
            "k_proj": (self.key_features, self.hidden_size),
            "v_proj": (self.key_features, self.hidden_size),
            "o_proj": (self.hidden_size, self.query_features),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """The linear layers of all blocks by their paths, each as (out, in)."""
        return {
            f"model.layers.{layer}.{_parent(name)}.{name}": size
            for layer in range(self.num_layers)
            for name, size in self.linear_shapes().items()
        }

    @property
    def matrix_elements(self) -> int:
        """Elements of all matrices that a token is multiplied with: the blocks' and the head's.

        The embedding table does not count, unless it is the head: a token picks a row of it.
        """
        block = sum(rows * columns for rows, columns in self.linear_shapes().values())
        return self.num_layers * block + self.vocab_size * self.hidden_size

    @property
    def break_even_length(self) -> float:
        """Tokens of a document at which attention costs as many FLOPs as the matrices do.

        Matrices, per token and element: 2 FLOPs forward and 2 for the gradient of the input. A
        frozen matrix has no gradient of its own. That is 4 in all.
        Attention, per token, query feature and token of the document: 2 products forward (scores,
        weighted values) and 5 backward (the scores again and four gradients). Each is 2 FLOPs over
        half of the square, the half that is not ahead, so 1 FLOP. That is 7 in all, in each block.
        """
        matrices = 4 * self.matrix_elements
        attention = 7 * self.num_layers * self.query_features  # per token of the document
        return matrices / attention

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint by its name in the files, in the files' order."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size)
        }
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            shapes[f"{prefix}.input_layernorm.weight"] = (self.hidden_size,)
            for name, (rows, columns) in self.linear_shapes().items():
                parent = _parent(name)
                shapes[f"{prefix}.{parent}.{name}.weight"] = (rows, columns)
                if name in self.biased:
                    shapes[f"{prefix}.{parent}.{name}.bias"] = (rows,)
            if self.qk_norm:
                shapes[f"{prefix}.self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{prefix}.self_attn.k_norm.weight"] = (self.head_dim,)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (self.hidden_size,)

        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def held_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter as it is held in memory: those of packed layers are (out, bytes)."""
        shapes = self.parameter_shapes()
        if self.packed:
            layers = self.linear_layers()
            shapes |= packed_shapes({f"{path}.weight": size for path, size in layers.items()})
        return shapes

    def held(self, number_bytes: int) -> dict[str, Held]:
        """Every parameter as it is held, where a number that is not packed takes number_bytes."""
        packed = {f"{path}.weight" for path in self.linear_layers()} if self.packed else set()
        return {
            name: Held(math.prod(shape), 1 if name in packed else number_bytes)
            for name, shape in self.held_shapes().items()
        }

    def held_bytes(self, number_bytes: int) -> int:
        """Bytes of all parameters where a number that is not packed takes number_bytes."""
        return sum(parameter.bytes for parameter in self.held(number_bytes).values())

    def held_matrices(self) -> dict[str, int]:
        """Elements of each linear layer's weight of one block as it is held: bytes if packed."""
        sizes = self.linear_shapes()
        if self.packed:
            sizes = packed_shapes(sizes)
        return {name: rows * columns for name, (rows, columns) in sizes.items()}


def _parent(name: str) -> str:
    """The module of a block that a linear layer belongs to."""
    return "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
