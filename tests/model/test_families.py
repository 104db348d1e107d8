"""Qwen2, Qwen3 and Mistral against transformers and PEFT: parameters, logits, LoRA gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minilora.files.model_config import shape_from_config
from minilora.model.rope import rotation
from tests.support.models import ours, random_model, tiles_of
from tests.support.peft_gradients import check_gradients, labelled_documents

NEW_FAMILIES = ("qwen2", "qwen3", "mistral")
# head_dim is 16 and hidden_size / heads 8 unless said otherwise; 4 heads share 2 kv heads.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 usual head_dim": ("qwen2", {"head_dim": 8}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 biases": ("qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
    "qwen3 yarn": ("qwen3", {"rope_parameters": YARN}),
    "mistral": ("mistral", {}),
    "mistral window": ("mistral", {"sliding_window": 40, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("keep_blocks", [0, 1], ids=["recomputed", "kept"])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_every_lora_gradient_equal_peft(name: str, keep_blocks: int) -> None:
    model_type, changes = CASES[name]
    theirs = random_model(model_type, **changes)
    model = ours(theirs, keep_blocks)
    documents = labelled_documents((5, 40, 12, 3))
    check_gradients(theirs, model, documents, tiles_of(model, (5,), (40, 12), (3,)))


@pytest.mark.parametrize("name", CASES)
def test_names_and_sizes_are_those_of_transformers(name: str) -> None:
    model_type, changes = CASES[name]
    theirs = random_model(model_type, **changes)
    shape = shape_from_config(theirs.config.to_dict())
    parameters = {name: tuple(tensor.shape) for name, tensor in theirs.named_parameters()}
    assert shape.parameter_shapes() == parameters
    linears = {
        name: (layer.out_features, layer.in_features)
        for name, layer in theirs.named_modules()
        if isinstance(layer, nn.Linear) and name != "lm_head"
    }
    assert list(shape.linear_layers().items()) == list(linears.items())


@pytest.mark.parametrize("model_type", NEW_FAMILIES)
def test_nothing_that_tells_the_families_apart_is_trivial(model_type: str) -> None:
    """Otherwise a bias left out, or a norm that is skipped, would change no number above."""
    for name, parameter in random_model(model_type).named_parameters():
        if name.endswith("bias") or "norm" in name:
            assert 0.01 < (parameter - parameter.mean()).abs().max(), name


@pytest.mark.parametrize("factor", [2.0, 4.0])
@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_scaled_rotation_equals_transformers(kind: str, factor: float) -> None:
    scaling = {"rope_type": kind, "rope_theta": 1000000.0, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = 32768
    theirs = random_model("qwen2", head_dim=128, rope_parameters=scaling)
    shape = shape_from_config(theirs.config.to_dict())
    positions = torch.cat([torch.arange(0, 64), torch.arange(131000, 131072)])
    cos, sin = theirs.model.rotary_emb(torch.zeros(1), positions[None])
    mine = rotation(shape.rope, shape.head_dim, positions, torch.float32)
    torch.testing.assert_close(mine[0][:, 0], cos[0], rtol=0, atol=0)
    torch.testing.assert_close(mine[1][:, 0], sin[0], rtol=0, atol=0)
