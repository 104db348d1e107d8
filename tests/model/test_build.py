"""A model whose numbers are still to be read: where its parameters are, and of which dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minilora.files.model_config import read_model_config
from minilora.model.build import NewAdapter, build_model
from minilora.model.llama import Llama
from minilora.model.lora_shape import LoraShape

LORA = LoraShape(4, 8, 0.0, ("q_proj", "down_proj"))


def test_frozen_and_trained_parameters_have_their_dtypes(tiny: Path) -> None:
    shape = read_model_config(tiny).shape
    adapter = NewAdapter(LORA, seed=3, dtype=torch.float32)
    model = build_model(shape, adapter, dtype=torch.bfloat16, place=torch.device("cpu"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name: tuple(p.shape) for name, p in trained.items()} == LORA.parameter_shapes(shape)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    frozen = {name: p for name, p in model.named_parameters() if name not in trained}
    assert {name: tuple(p.shape) for name, p in frozen.items()} == shape.parameter_shapes()
    assert {p.dtype for p in frozen.values()} == {torch.bfloat16}


def test_the_last_blocks_keep_their_activations(tiny: Path) -> None:
    shape = read_model_config(tiny).shape

    def flags(model: Llama) -> list[dict[str, object]]:
        """What the blocks are told, by its names there."""
        return [
            {name: value for name, value in vars(block).items() if isinstance(value, bool | int)}
            for block in model.model.layers
        ]

    for count in range(shape.num_layers + 1):
        model = build_model(
            shape, None, dtype=torch.float32, place=torch.device("meta"), keep_blocks=count
        )
        assert flags(model) == flags(Llama(shape, count))
    assert flags(Llama(shape, 0)) != flags(Llama(shape, 1))


def test_parameters_are_made_in_the_place(tiny: Path) -> None:
    model = build_model(
        read_model_config(tiny).shape, None, dtype=torch.float32, place=torch.device("meta")
    )
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert not any(p.requires_grad for p in model.parameters())


def test_the_default_dtype_is_put_back(tiny: Path) -> None:
    shape = read_model_config(tiny).shape
    assert torch.get_default_dtype() == torch.float32
    build_model(shape, None, dtype=torch.bfloat16, place=torch.device("cpu"))
    assert torch.get_default_dtype() == torch.float32
    missing = NewAdapter(LoraShape(4, 8, 0.0, ("q_proj",), modules_to_save=("none",)), 0,
                         torch.float32)  # fmt: skip
    with pytest.raises(KeyError):
        build_model(shape, missing, dtype=torch.bfloat16, place=torch.device("cpu"))
    assert torch.get_default_dtype() == torch.float32


def test_lora_a_depends_on_the_seed(tiny: Path) -> None:
    shape = read_model_config(tiny).shape
    first, same, other = (
        build_model(
            shape,
            NewAdapter(LORA, seed, torch.float32),
            dtype=torch.float32,
            place=torch.device("cpu"),
        )
        for seed in (1, 1, 2)
    )
    name = "model.layers.0.self_attn.q_proj.lora_A"
    assert torch.equal(first.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
