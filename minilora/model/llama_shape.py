"""The sizes of a Llama, and what follows from them: arithmetic, without torch or files."""

from __future__ import annotations

from dataclasses import dataclass


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
    """The sizes of a Llama: everything that its parameters and its arithmetic depend on.

    max_positions: the longest document that the checkpoint was trained for, in tokens, or None
    where config.json does not say. It limits nothing here; longer documents get a warning.
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
    attention_bias: bool = False
    mlp_bias: bool = False
    max_positions: int | None = None

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
    def break_even_length(self) -> float:
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
