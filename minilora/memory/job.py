"""What the memory of a run depends on, and what autograd keeps of a token in one block."""

# Shape letters: D model, F MLP, Q query and K key features, N tokens.

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from minilora.memory.zero3_gathers import Zero
from minilora.model.llama_shape import LlamaShape
from minilora.model.lora_shape import WHOLE, LoraShape
from minilora.settings.errors import RequestError
from minilora.settings.settings import Settings


@dataclass(frozen=True)
class MemoryJob:
    """All that the memory of one rank depends on; the names are those of the settings.

    step_tokens: most tokens of a rank in an optimizer step; longest: most in one document;
    keep_blocks: blocks, the last ones, whose activations are kept; on_gpu: False counts the CPU's
    attention, which copies more.
    """

    shape: LlamaShape
    zero: Zero
    ranks: int
    adapter: LoraShape
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
        """Elements of each trained tensor of a block: of the largest block, where they differ."""
        return dict(_of_a_block(self.adapter, self.shape))

    @property
    def whole(self) -> dict[str, int]:
        """Elements of each weight that is trained without LoRA, by its parameter's name."""
        size = self.shape.vocab_size * self.shape.hidden_size
        return {WHOLE[name]: size for name in self.adapter.modules_to_save}

    @property
    def features(self) -> tuple[int, int, int, int]:
        """D, F, Q and K."""
        sizes = self.shape.linear_shapes()
        return self.shape.hidden_size, sizes["up_proj"][0], sizes["q_proj"][0], sizes["k_proj"][0]

    def pinned(self, elements: int) -> int:
        """Bytes of a tensor in pinned memory, of which torch takes a power of 2.

        PowerOf2Ceil in ATen/core/CachingHostAllocator.h.
        """
        size = elements * self.size
        return 1 << (size - 1).bit_length() if self.on_gpu else size

    @property
    def kept(self) -> tuple[int, int]:
        """Elements that autograd keeps per token: of attention, of the MLP with the second norm.

        Attention: its normed input, q, k, v, output and a sum per head (fp32); where q and k are
        normed, both as they were before, and a number per head (fp32) for each. The MLP: its input,
        the same normed, gate, up and silu(gate) x up. A LoRA pair: its R numbers, with dropout its
        masked input and the mask, with DoRA its output before it is scaled.
        """
        (d, f, q, k), sizes, lora = self.features, self.shape.linear_shapes(), self.lora
        dropout, dora = self.adapter.dropout > 0, self.adapter.use_dora
        copied = 0 if self.on_gpu else q  # documents' outputs are put together
        attention = d + 2 * q + 2 * k + self.shape.num_heads * 4 // self.size + copied
        if self.shape.qk_norm:
            heads = self.shape.num_heads + self.shape.num_kv_heads
            attention += q + k + heads * 4 // self.size
        pairs = {
            name: lora[f"{name} lora_A"] // size + (2 + dora) * size * dropout + dora * out
            for name, (out, size) in sizes.items()
            if f"{name} lora_A" in lora
        }
        of_attention = sum(size for name, size in pairs.items() if name[0] in "qkvo")
        return attention + of_attention, 2 * d + 3 * f + sum(pairs.values()) - of_attention


@functools.cache
def _of_a_block(adapter: LoraShape, shape: LlamaShape) -> tuple[tuple[str, int], ...]:
    """The largest of each kind of trained tensor, such as `q_proj lora_A`, and its elements."""
    largest: dict[str, int] = {}
    for path, size in adapter.parameter_shapes(shape).items():
        if path not in WHOLE.values():
            kind = " ".join(path.split(".")[-2:])
            largest[kind] = max(largest.get(kind, 0), math.prod(size))
    return tuple(largest.items())


def kept_blocks(settings: Settings, shape: LlamaShape) -> int:
    """Blocks that keep their activations by the settings alone; 0 where what fits is kept.

    Raises RequestError for more than there are.
    """
    layers, asked = shape.num_layers, settings.train.keep_blocks or 0
    if asked > layers:
        name = settings.name_of("keep_blocks")
        raise RequestError([f"{name}: {asked}; the model has {layers} blocks"])
    return layers if settings.model.disable_gradient_checkpointing else asked


def memory_job(settings: Settings, shape: LlamaShape, zero: Zero, ranks: int) -> MemoryJob:
    """What the settings mean for one rank at worst: every document cutoff_len tokens long.

    Raises RequestError for an adapter that does not fit the model, or more blocks than it has.
    """
    train, longest = settings.train, settings.data.cutoff_len
    documents = train.per_device_train_batch_size * train.gradient_accumulation_steps
    return MemoryJob(
        shape=shape,
        zero=zero,
        ranks=ranks,
        adapter=LoraShape.of(settings.method, shape),
        bf16=train.bf16 is not False,
        keep_blocks=kept_blocks(settings, shape),
        tile_tokens=train.tile_tokens,
        gather_tokens=train.gather_tokens,
        loss_tokens=train.loss_tokens,
        offload_activations=train.offload_activations,
        step_tokens=documents * longest,
        longest=longest,
    )
