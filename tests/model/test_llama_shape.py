"""The sizes of a Llama and what follows from them, against the modules of transformers."""

from __future__ import annotations

import pytest
from torch import nn

from minilora.files.model_config import shape_from_config
from tests.support.models import random_llama

CHANGES = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one bias": {"attention_bias": True},
    "one kv head": {"num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 3},
}


@pytest.mark.parametrize("name", CHANGES)
def test_names_and_sizes_are_those_of_transformers(name: str) -> None:
    theirs = random_llama(**CHANGES[name])
    shape = shape_from_config(theirs.config.to_dict())
    # A tied head is one parameter there, and one tensor in the files, under the first name.
    parameters = {name: tuple(tensor.shape) for name, tensor in theirs.named_parameters()}
    assert shape.parameter_shapes() == parameters

    linears = {name: m for name, m in theirs.named_modules() if isinstance(m, nn.Linear)}
    assert shape.matrix_elements == sum(layer.weight.numel() for layer in linears.values())
    del linears["lm_head"]
    sizes = {name: (layer.out_features, layer.in_features) for name, layer in linears.items()}
    assert shape.linear_layers() == sizes
    assert list(shape.linear_layers()) == list(sizes), "in the model's order"
