"""The limits within which ZeRO-3 gathers weights, from the model's sizes.

DeepSpeed counts in elements of parameters, not in bytes. An element of a matrix that is packed to 4
bits is a byte, which holds nearly two weights.
"""

from __future__ import annotations

import math

from minilora.model.llama_shape import LlamaShape


def limits_from_block(shape: LlamaShape) -> dict[str, int]:
    """What a ZeRO-3 file means that does not say them; keys of its zero_optimization section.

    ds_configs/README.md has the reason for each, with the numbers of Llama-3.1-8B.
    """
    block = sum(shape.held_matrices().values())
    smallest = min(math.prod(size) for size in shape.linear_shapes().values())
    return {
        # DeepSpeed adds whole tensors until the bucket is full: exactly the next block.
        "stage3_prefetch_bucket_size": block,
        # The block at work and the next one.
        "stage3_max_live_parameters": 2 * block,
        # In minilora the two uses of a block are farther apart, so that no block is kept.
        "stage3_max_reuse_distance": block,
        # Smaller tensors stay whole: norms, and the matrices of an adapter of a usual rank. A
        # packed matrix has 17/32 as many elements as weights, so that every one is still split.
        "stage3_param_persistence_threshold": smallest // 4,
    }


def limits_of_the_trainer(shape: LlamaShape) -> dict[str, int]:
    """What the HF Trainer puts for "auto". Other limits may not be "auto" there."""
    square = shape.hidden_size**2
    return {
        "zero_optimization.reduce_bucket_size": square,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * square),
        "zero_optimization.stage3_param_persistence_threshold": 10 * shape.hidden_size,
    }
