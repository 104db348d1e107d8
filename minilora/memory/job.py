"""What the memory of a run depends on: the model, the adapter, ZeRO and sizes in tokens."""

# Shape letters: D model, F MLP, Q features of the queries, K features of the keys.

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

    keep_blocks: how many blocks, the last ones, save their activations instead of recomputing
    them; step_tokens: most tokens of a rank in an optimizer step; longest: most tokens of one
    document; on_gpu: False counts the CPU's kernels, which need more; ranks: of all machines,
    which have as many each.
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
    machines: int = 1

    @property
    def size(self) -> int:
        """Bytes of an element of what is computed with."""
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
    def loss_chunk(self) -> int:
        """Most tokens whose logits exist at a time."""
        return min(self.loss_tokens, self.span)

    @property
    def spans(self) -> int:
        """Micro-steps per optimizer step where all documents are the longest."""
        documents = -(-self.step_tokens // self.longest)
        documents_per_span = max(1, self.span // self.longest)
        return -(-documents // documents_per_span)

    @property
    def lora(self) -> dict[str, int]:
        """Elements of each trained tensor of a block: of the largest block, where they differ."""
        return dict(_lora_of_a_block(self.adapter, self.shape))

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

    def pinned(self, elements: int, itemsize: int | None = None) -> int:
        """Bytes that a tensor takes in pinned host memory: on a GPU, the next power of two.

        itemsize: bytes of an element, if not those of what is computed with. Source: PowerOf2Ceil
        in ATen/core/CachingHostAllocator.h of torch.
        """
        size = elements * (itemsize or self.size)
        return 1 << (size - 1).bit_length() if self.on_gpu else size


@functools.cache
def _lora_of_a_block(adapter: LoraShape, shape: LlamaShape) -> tuple[tuple[str, int], ...]:
    """The largest of each kind of trained tensor, such as `q_proj lora_A`, and its elements."""
    largest: dict[str, int] = {}
    for path, size in adapter.parameter_shapes(shape).items():
        if path not in WHOLE.values():
            kind = " ".join(path.split(".")[-2:])
            largest[kind] = max(largest.get(kind, 0), math.prod(size))
    return tuple(largest.items())


def kept_blocks(settings: Settings, shape: LlamaShape) -> int:
    """How many blocks save their activations by the settings alone; 0 where the run decides.

    Raises RequestError for more blocks than there are.
    """
    layers = shape.num_layers
    asked = settings.train.keep_blocks or 0
    if asked > layers:
        name = settings.name_of("keep_blocks")
        raise RequestError([f"{name}: {asked}; the model has {layers} blocks"])
    return layers if settings.model.disable_gradient_checkpointing else asked


def memory_job(settings: Settings, shape: LlamaShape, zero: Zero, ranks: int) -> MemoryJob:
    """What the settings mean for one rank at worst: every document cutoff_len tokens long.

    Raises RequestError for an adapter that does not fit the model, or more blocks than it has.
    """
    train = settings.train
    longest = settings.data.cutoff_len
    documents = train.per_device_train_batch_size * train.gradient_accumulation_steps
    return MemoryJob(
        shape=shape,
        zero=zero,
        ranks=ranks,
        adapter=LoraShape.of(settings.method, shape),
        bf16=train.bf16 is not False,
        keep_blocks=kept_blocks(settings, shape),
        tile_tokens=train.least_tile_tokens,
        gather_tokens=train.gather_tokens,
        loss_tokens=train.loss_tokens,
        offload_activations=train.offload_activations,
        step_tokens=documents * longest,
        longest=longest,
    )
