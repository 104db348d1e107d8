"""What every variant computes: shapes, weights and rows that follow from names and seeds alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minilora.files.model_config import shape_from_config
from minilora.model.llama_shape import LlamaShape
from minilora.model.lora_shape import LoraShape

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# LLaMA-Factory's examples/deepspeed/ds_z3_config.json.
LLAMA_FACTORY: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
Row = tuple[NDArray[np.int32], NDArray[np.bool_]]


@dataclass(frozen=True)
class Size:
    """A model and the lengths of its rows.

    equal: tokens of an equal-length row; cutoff: of the longest skewed row; short: of most of them;
    per_device: rows of a micro-batch of one rank; accumulation: micro-batches of a step.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    rank: int
    equal: int
    cutoff: int
    short: int
    per_device: int
    accumulation: int

    def config(self) -> dict[str, Any]:
        """config.json of this size; what is not a size is Llama-3.1-8B's."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "tie_word_embeddings": False,
        }

    @property
    def shape(self) -> LlamaShape:
        return shape_from_config(self.config())

    @property
    def lora(self) -> LoraShape:
        return LoraShape(self.rank, 2 * self.rank, 0.0, TARGETS)

    @property
    def block(self) -> int:
        """Elements of one block's matrices."""
        return sum(rows * columns for rows, columns in self.shape.linear_shapes().values())

    def model_flops(self, length: int) -> float:
        """Forward and backward of a document, LoRA's share included, recomputing not.

        2 per parameter in forward and in backward: frozen weights get no gradient. Causal
        attention is 2 matmuls forward and 5 backward over half the square of the length.
        """
        shape = self.shape
        square = self.layers * 2 * length * shape.num_heads * shape.head_dim
        return length * (4 * shape.matrix_elements + 3.5 * square + 6 * self.lora.size(shape))


SIZES = {
    "tiny": Size(64, 176, 2, 4, 2, 512, 4, 64, 256, 12, 2, 4),
    "mid": Size(256, 704, 4, 8, 4, 4096, 8, 128, 2048, 60, 4, 4),
    "8b": Size(4096, 14336, 32, 32, 8, 128256, 16, 2048, 2048, 60, 4, 4),
}


def rows(size: Size, workload: str, count: int) -> list[Row]:
    """The first `count` rows, as token ids and whether each is trained.

    equal: all of one length, every token trained. skewed: 15 of 16 about `short` tokens long, the
    others spread up to the cutoff, the second half of each trained, as in question and answer.
    """
    source = np.random.Generator(np.random.PCG64(5))
    made = []
    for index in range(count):
        if workload == "equal":
            length, untrained = size.equal, 0
        else:
            usual = size.short * source.lognormal(0.0, 0.25)
            rare = source.uniform(size.cutoff / 4, size.cutoff)
            length = int(rare if index % 16 == 7 else min(max(usual, 4), size.cutoff))
            untrained = length // 2
        ids = source.integers(0, size.vocab, length, dtype=np.int32)
        made.append((ids, np.arange(length) >= untrained))
    return made


def micro_batches(size: Size, made: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """The rows as the peers batch them."""
    for start in range(0, len(made), size.per_device):
        yield made[start : start + size.per_device]


def padded(batch: Sequence[Row]) -> dict[str, Tensor]:
    """A batch as LLaMA-Factory's collator makes it: up to its longest row, a multiple of 8."""
    longest = -(-max(len(ids) for ids, _ in batch) // 8) * 8
    made = {
        "input_ids": torch.zeros(len(batch), longest, dtype=torch.int64),
        "attention_mask": torch.zeros(len(batch), longest, dtype=torch.int64),
        "labels": torch.full((len(batch), longest), -100),
    }
    for row, (ids, trained) in enumerate(batch):
        values = torch.from_numpy(ids.astype(np.int64))
        made["input_ids"][row, : len(ids)] = values
        made["attention_mask"][row, : len(ids)] = 1
        labels = torch.where(torch.from_numpy(trained), values, -100)
        made["labels"][row, : len(ids)] = labels
    return made


def weight(name: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """The random weight of this name, on the device and in the dtype of `like`."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    generator = torch.Generator(like.device).manual_seed(seed)
    numbers = torch.randn(tuple(shape), generator=generator, device=like.device)
    if len(shape) == 1:
        numbers = numbers * 0.1 + 1  # a norm
    elif name.endswith("lora_B"):
        numbers *= 0.02
    else:
        numbers *= shape[-1] ** -0.5
    return numbers.to(like.dtype)
