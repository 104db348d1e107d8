"""Tiny checkpoints of the other families, written by transformers, with the tiny tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from tests.support.models import random_model

# Sizes like the tiny Llama's, and what tells each family apart.
TINY: dict[str, dict[str, object]] = {
    "qwen2": {"head_dim": 8, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "mistral": {"head_dim": 8, "num_key_value_heads": 1},
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)


def write_family(folder: Path, model_type: str, tiny: Path) -> Path:
    """A checkpoint of two blocks in fp32 and several shards. tiny: whose tokenizer it gets."""
    model = random_model(
        model_type, vocab_size=512, intermediate_size=64, initializer_range=0.15, **TINY[model_type]
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="60KB")
    for name in TOKENIZER_FILES:
        shutil.copyfile(tiny / name, folder / name)
    return folder
