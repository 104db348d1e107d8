"""The ranks, batches and stages of the runs that are compared with PEFT."""

from __future__ import annotations

from typing import Any

# (ranks, per device batch, accumulation, ZeRO stage), all of 12 rows per optimizer step.
COMBINATIONS = [(1, 12, 1, 0), (1, 3, 4, 3), (2, 2, 3, 3), (3, 2, 2, 3), (3, 1, 4, 2), (2, 6, 1, 1)]
FAMILY_STEPS = 5
FAMILY_COMBINATIONS = [(1, 12, 1, 0), (1, 3, 4, 3), (3, 1, 4, 0), (3, 2, 2, 3)]
MODELS = ("tiny", "tiny_tied")
# Checkpoints of other families than Llama; of them ZeRO-3 and ZeRO-0 on 1, 2 and 3 ranks.
OTHER_MODELS = ("qwen2", "qwen3", "mistral")
OTHER_COMBINATIONS = [(1, 3, 4, 3), (2, 6, 1, 0), (3, 2, 2, 3)]
# Runs over weights in 4 bits: (ranks, per device batch, accumulation, ZeRO stage), the start
# adapter, packing, and other settings.
SPANS = {"tile_tokens": 100, "gather_tokens": 300}


FOUR_BITS: dict[str, tuple[tuple[int, int, int, int], str, bool, dict[str, Any]]] = {
    "one rank, kept": ((1, 12, 1, 0), "packable", False, {"keep_blocks": 2}),
    "one rank, spans": ((1, 3, 4, 3), "packable", True, {**SPANS, "keep_blocks": 0}),
    "two ranks, stage 0, spans": ((2, 6, 1, 0), "packable", False, {**SPANS, "keep_blocks": 1}),
    "two ranks, stage 1, DoRA": ((2, 6, 1, 1), "packable_dora", False, {"keep_blocks": 1}),
    "two ranks, stage 2": ((2, 3, 2, 2), "packable", True, {"keep_blocks": 0}),
    "two ranks, offloaded": (
        (2, 2, 3, 3), "packable", False, {"keep_blocks": 0, "offload_activations": True}
    ),
    "three ranks, kept": ((3, 2, 2, 3), "packable", True, {"keep_blocks": 2}),
    "three ranks, DoRA, spans": ((3, 2, 2, 3), "packable_dora", False, {**SPANS, "keep_blocks": 1}),
    "bf16": ((2, 2, 3, 3), "packable", False, {"bf16": True, "keep_blocks": 1}),
}  # fmt: skip


def model_of_start(start: str) -> str:
    """The checkpoint that a start adapter belongs to."""
    if start.startswith("packable"):
        return "packable"
    return start if start in (*MODELS, *OTHER_MODELS) else "tiny"
