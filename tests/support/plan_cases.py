"""The settings for which the memory plan is held against counted bytes, by number of ranks."""

from __future__ import annotations

from typing import Any

# 1024 tokens per rank and step unless said otherwise; fp32, since the CPU's bf16 products take
# scratch memory. The model has 4 blocks of hidden size 256, and 4096 words.
BASE: dict[str, Any] = {
    "bf16": False,
    "cutoff_len": 128,
    "lora_rank": 8,
    "accumulation": 2,
    "tile_tokens": 256,
    "loss_tokens": 128,
}
# Weights packed to 4 bits; half of the tokens are enough.
PACKED: dict[str, Any] = {"quantization_bit": 4, "batch": 2}
WHOLE = ["embed_tokens", "lm_head"]
CASES: dict[int, list[dict[str, Any]]] = {
    1: [
        {"deepspeed": "zero0"},
        {"deepspeed": "zero0", "tile_tokens": 512, "gather_tokens": 512, "lora_rank": 32},
        {"deepspeed": "zero0", "keep_blocks": 4},
        {"deepspeed": "zero0", "keep_blocks": 4, "cutoff_len": 1024, "batch": 1, "tile_tokens": 64},
        {"deepspeed": "zero0", "lora_dropout": 0.1, "lora_rank": 32},
        {"deepspeed": "zero0", "cutoff_len": 1024, "batch": 1, "gather_tokens": 1024},
        {"deepspeed": "zero0", "cutoff_len": 1024, "batch": 1, "tile_tokens": 64},
        {"deepspeed": "zero3", "loss_tokens": 512},
        {"deepspeed": "zero0", "use_dora": True},
        {"deepspeed": "zero0", "use_dora": True, "keep_blocks": 4},
        {"deepspeed": "zero0", "additional_target": WHOLE},
        {"deepspeed": "zero0", "keep_blocks": 4, "model_type": "qwen3"},
        {"deepspeed": "zero0", "keep_blocks": 2, **PACKED},
    ],
    2: [
        {"deepspeed": "zero3"},
        {"deepspeed": "zero3", "tied": True, "gather_tokens": 512},
        {"deepspeed": "zero3", "keep_blocks": 4, "lora_target": ["q_proj", "v_proj"]},
        {"deepspeed": "zero2", "gather_tokens": 512},
        {"deepspeed": "zero2", "tile_tokens": 1024, "reduce_bucket_size": 10**6},
        {"deepspeed": "zero2", "bf16": True, "loss_tokens": 1024},
        {"deepspeed": "zero3", "offload_activations": True},
        {"deepspeed": "zero3", "additional_target": WHOLE, "gather_tokens": 512},
        {"deepspeed": "zero3", "additional_target": WHOLE[:1], "use_dora": True},
        {"deepspeed": "zero2", "additional_target": WHOLE, "gather_tokens": 512},
        {"deepspeed": "zero3", "keep_blocks": 2, "gather_tokens": 512},
        {"deepspeed": "zero3", "keep_blocks": 1, "offload_activations": True},
        {"deepspeed": "zero3", "keep_blocks": 2, "model_type": "qwen3"},
        {"deepspeed": "zero2", "gather_tokens": 512, "lora_rank": 32, **PACKED},
        {"deepspeed": "zero3", "gather_tokens": 512, "use_dora": True, **PACKED},
    ],
    3: [
        {"deepspeed": "zero3", "packing": True, "gather_tokens": 512},
        {"deepspeed": "zero2", "packing": True},
        {"deepspeed": "zero3", "tile_tokens": 512, "gather_tokens": 512, "tied": True},
        {"deepspeed": "zero2", "gather_tokens": 512, "tied": True, **PACKED},
    ],
    6: [
        {"deepspeed": "zero3_nodes", "machine_ranks": 2, "gather_tokens": 512},
        {"deepspeed": "zero3_nodes", "machine_ranks": 3, **PACKED},
    ],
    7: [
        {"deepspeed": "zero3", "gather_tokens": 256, "loss_tokens": 512},
        {"deepspeed": "zero3", "tile_tokens": 1024, "loss_tokens": 512},
        {"deepspeed": "zero2", "tile_tokens": 128},
        {"deepspeed": "zero0", "batch": 1},
        {"deepspeed": "zero3", "additional_target": WHOLE[1:]},
        {"deepspeed": "zero0", "keep_blocks": 4, "gather_tokens": 256, **PACKED},
        {"deepspeed": "zero3", "gather_tokens": 256, **PACKED},
        {"deepspeed": "zero3", "tile_tokens": 64, "gather_tokens": 256, **PACKED},
    ],
}
