"""The sizes of a Llama and what follows from them, against the modules of transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from minilora.files.model_config import shape_from_config
from minilora.model.llama import Llama
from minilora.settings.errors import RequestError
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


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_held_is_what_the_model_holds(packed: bool) -> None:
    theirs = random_llama(hidden_size=64, intermediate_size=128, attention_bias=True)
    shape = replace(shape_from_config(theirs.config.to_dict()), packed=packed)
    held = {name: tuple(parameter.shape) for name, parameter in Llama(shape).named_parameters()}
    assert shape.held_shapes() == held
    for dtype in (torch.float32, torch.bfloat16):
        parameters = Llama(shape).to(dtype).parameters()
        assert shape.held_bytes(dtype.itemsize) == sum(p.nbytes for p in parameters)


def test_four_bits_need_rows_of_whole_blocks() -> None:
    shape = shape_from_config(random_llama().config.to_dict())
    assert shape.in_bits(None) is shape
    with pytest.raises(RequestError) as refused:
        shape.in_bits(4)
    assert len(refused.value.problems) == 6  # all but o_proj, whose rows are of 64 weights
    assert "up_proj has rows of 32 weights" in str(refused.value)
    wide = replace(shape, hidden_size=64, intermediate_size=128)
    assert wide.in_bits(4) == replace(wide, packed=True)
