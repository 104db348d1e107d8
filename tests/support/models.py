"""Random Llamas of transformers, ours with their weights, and ours with LoRA in training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from minilora.files.model_config import shape_from_config
from minilora.model.llama import Llama
from minilora.model.lora import inject, lora_parameters
from minilora.model.lora_shape import LoraShape
from minilora.model.tiles import DocumentTile, document_tiles

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTHS = (7, 20, 5, 11, 3)  # the documents of `batch`


# What each family's config.json says in these tests beside the sizes.
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "mistral": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_window": None,
    },
}


def random_llama(**changes: object) -> LlamaForCausalLM:
    return random_model("llama", **changes)


def random_model(model_type: str, **changes: object) -> PreTrainedModel:
    """A model of two blocks as transformers makes it, no number of it zero or one."""
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
    config = AutoConfig.for_model(model_type, **{**sizes, **FAMILIES[model_type], **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # norms and biases too must not be trivial
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def ours(theirs: PreTrainedModel, keep_blocks: int = 0) -> Llama:
    """Our model with the weights of theirs."""
    shape = shape_from_config(theirs.config.to_dict())
    model = Llama(shape, keep_blocks)
    expected = set(shape.parameter_shapes())
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name in expected}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shape.parameter_shapes()
    model.load_state_dict(state, strict=not shape.tied)
    return model


def tiles_of(model: Llama, *lengths: Sequence[int]) -> list[DocumentTile]:
    return document_tiles(model.shape, lengths, 0, torch.empty(0))


def adapted_llama(
    keep_blocks: int = 0, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> Llama:
    """Two blocks with LoRA on all layers, of which the last ones save their activations."""
    model = ours(random_llama(), keep_blocks)
    inject(model, LoraShape(4, 8, dropout, TARGETS), seed=0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in lora_parameters(model):
        if name.endswith("lora_B"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.to(dtype)


def batch() -> tuple[Tensor, Tensor]:
    """Token ids and labels of documents of LENGTHS; every third token has no label."""
    generator = torch.Generator().manual_seed(5)
    token_ids = torch.randint(0, 128, (sum(LENGTHS),), generator=generator)
    labelled = torch.arange(len(token_ids)) % 3 > 0
    return token_ids, torch.where(labelled, token_ids.roll(-1), -100)


def gradients(
    model: Llama, lengths: Sequence[Sequence[int]], piece_tokens: int | None = None
) -> dict[str, Tensor]:
    """The gradient of every trained parameter for the batch in tiles of these lengths."""
    token_ids, labels = batch()
    like = torch.empty(0, dtype=model.lm_head.weight.dtype)
    tiles = document_tiles(model.shape, lengths, 0, like, piece_tokens)
    model(token_ids, labels, tiles, 1.0).backward()
    found = {}
    for name, parameter in lora_parameters(model):
        assert parameter.grad is not None and parameter.grad.any(), name
        found[name] = parameter.grad
    return found
