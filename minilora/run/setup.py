"""What the memory of a run depends on, and what autograd keeps of a token in one block."""

# Shape letters: D model, F MLP, Q query and K key features, N tokens.

from __future__ import annotations

from dataclasses import dataclass

from minilora.config import RequestError, Settings
from minilora.model.shape import LlamaShape
from minilora.run.gathers import Zero


@dataclass(frozen=True)
class Setup:
    """All that the memory of one rank depends on; the names are those of the settings.

    step_tokens: most tokens of a rank in an optimizer step; longest: most in one document;
    keep_blocks: blocks, the last ones, whose activations are kept; on_gpu: False counts the CPU's
    attention, which copies more.
    """

    shape: LlamaShape
    zero: Zero
    ranks: int
    lora_rank: int
    targets: tuple[str, ...]
    dropout: bool
    bf16: bool
    keep_blocks: int
    tile_tokens: int
    gather_tokens: int | None
    loss_tokens: int
    offload_activations: bool
    step_tokens: int
    longest: int
    on_gpu: bool = True

    @property
    def size(self) -> int:
        """Bytes of a number that is computed with."""
        return 2 if self.bf16 else 4

    @property
    def span(self) -> int:
        """Most tokens that share one gather of each block."""
        return min(self.step_tokens, max(self.gather_tokens or self.step_tokens, self.longest))

    @property
    def tile(self) -> int:
        """Most tokens that a block's attention computes at a time."""
        return min(self.span, max(self.tile_tokens, self.longest))

    @property
    def piece(self) -> int:
        """Most tokens that a block's MLP computes at a time."""
        return min(self.tile, self.tile_tokens)

    @property
    def spans(self) -> int:
        """Micro-steps per optimizer step where all documents are the longest."""
        documents = -(-self.step_tokens // self.longest)
        return -(-documents // max(1, self.span // self.longest))

    @property
    def lora(self) -> dict[str, int]:
        """Elements of each trained matrix of a block."""
        pairs = {name: self.shape.linear_shapes()[name] for name in self.targets}
        sizes = {(name, i): pair[i] for name, pair in pairs.items() for i in (0, 1)}
        return {f"{name} {i}": self.lora_rank * size for (name, i), size in sizes.items()}

    @property
    def features(self) -> tuple[int, int, int, int]:
        """D, F, Q and K."""
        sizes = self.shape.linear_shapes()
        return self.shape.hidden_size, sizes["up_proj"][0], sizes["q_proj"][0], sizes["k_proj"][0]

    @property
    def kept(self) -> tuple[int, int]:
        """Elements that autograd keeps per token: of attention, of the MLP with the second norm.

        Attention: its normed input, q, k, v, output and a sum per head (fp32). The MLP: its input,
        the same normed, gate, up and silu(gate) x up. A LoRA pair: its R numbers, and
        with dropout its masked input and the mask.
        """
        (d, f, q, k), sizes = self.features, self.shape.linear_shapes()
        copied = 0 if self.on_gpu else q  # documents' outputs are put together
        attention = d + 2 * q + 2 * k + self.shape.num_heads * 4 // self.size + copied
        pairs = {name: self.lora_rank + 2 * sizes[name][1] * self.dropout for name in self.targets}
        of_attention = sum(size for name, size in pairs.items() if name[0] in "qkvo")
        return attention + of_attention, 2 * d + 3 * f + sum(pairs.values()) - of_attention


def setup_of(settings: Settings, shape: LlamaShape, zero: Zero, ranks: int) -> Setup:
    """What the settings mean for one rank at worst: every document cutoff_len tokens long.

    Raises RequestError for a lora_target that names no layer.
    """
    train, method, layers = settings.train, settings.method, tuple(shape.linear_shapes())
    unknown = [name for name in method.lora_target if name not in (*layers, "all")]
    if unknown:
        known = f"known: {', '.join(layers)}"
        raise RequestError([f"lora_target: no layer is called {n}; {known}" for n in unknown])
    every, longest = "all" in method.lora_target, settings.data.cutoff_len
    documents = train.per_device_train_batch_size * train.gradient_accumulation_steps
    keep = shape.num_layers if settings.model.disable_gradient_checkpointing else train.keep_blocks
    if keep is not None and keep > shape.num_layers:
        raise RequestError([f"keep_blocks: {keep}; the model has {shape.num_layers} blocks"])
    return Setup(
        shape=shape,
        zero=zero,
        ranks=ranks,
        lora_rank=method.lora_rank,
        targets=tuple(name for name in layers if every or name in method.lora_target),
        dropout=method.lora_dropout > 0,
        bf16=train.bf16 is not False,
        keep_blocks=keep or 0,
        tile_tokens=train.tile_tokens,
        gather_tokens=train.gather_tokens,
        loss_tokens=train.loss_tokens,
        offload_activations=train.offload_activations,
        step_tokens=documents * longest,
        longest=longest,
    )
