"""Random Llamas of transformers, and ours with their weights."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minilora.files.model_config import shape_from_config
from minilora.model.llama import Llama
from minilora.model.tiles import document_tiles

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def random_llama(**changes: object) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 131072,
        "rope_parameters": LLAMA3_ROPE,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))
    for parameter in model.parameters():  # norms and biases too must not be trivial
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def ours(theirs: LlamaForCausalLM, keep_blocks: int = 0) -> Llama:
    shape = shape_from_config(theirs.config.to_dict())
    model = Llama(shape, keep_blocks)
    expected = set(shape.parameter_shapes())
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name in expected}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shape.parameter_shapes()
    model.load_state_dict(state, strict=not shape.tied)
    return model


def tiles_of(model: Llama, *lengths: tuple[int, ...]) -> list:
    return document_tiles(model.shape, lengths, 0, torch.empty(0))
