"""Packed weights in the model: the same gradients, unpacked once per block and direction."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minilora.model import matrix
from minilora.model.llama import Llama
from minilora.model.lora import inject, lora_parameters
from minilora.model.lora_shape import LoraShape
from minilora.model.matrix import Matrix, unpacked_once
from minilora.model.nf4 import pack, unpack
from tests.support.models import LENGTHS, TARGETS, batch, gradients, ours, random_llama, tiles_of

ONE_TILE = [LENGTHS]
THREE_TILES = [LENGTHS[:1], LENGTHS[1:3], LENGTHS[3:]]
MATRICES = 2 * 7  # of both blocks


def llama(
    packed: bool, keep: int = 0, dropout: float = 0.0, dora: bool = False, offload: bool = False
) -> Llama:
    """Two blocks with LoRA over packed weights, or over the numbers that these unpack to."""
    wide = ours(random_llama(hidden_size=64, intermediate_size=128, mlp_bias=True))
    state = wide.state_dict()
    for path in wide.shape.linear_layers():
        weight = pack(state[f"{path}.weight"])
        state[f"{path}.weight"] = weight if packed else unpack(weight, torch.float32)
    model = Llama(replace(wide.shape, packed=packed), keep)
    model.load_state_dict(state)

    inject(model, LoraShape(4, 8, dropout, TARGETS, use_dora=dora), seed=0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in lora_parameters(model):
        if not name.endswith("lora_A"):
            parameter.data = torch.rand(parameter.shape, generator=generator)
    if offload:
        model.model.offload_inputs()
    return model


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A weak reference to every tensor that a weight was unpacked to."""
    made: list[Any] = []

    def noted(packed: Tensor, dtype: torch.dtype) -> Tensor:
        numbers = unpack(packed, dtype)
        made.append(weakref.ref(numbers))
        return numbers

    monkeypatch.setattr(matrix, "unpack", noted)
    yield made


@pytest.mark.parametrize("tiles", [ONE_TILE, THREE_TILES], ids=["one tile", "tiles"])
@pytest.mark.parametrize("piece", [None, 4], ids=["", "pieces"])
@pytest.mark.parametrize(
    "kind",
    [{}, {"keep": 1}, {"keep": 2}, {"offload": True}, {"dropout": 0.3}, {"dora": True},
     {"dora": True, "dropout": 0.3, "keep": 1}],
    ids=str,
)  # fmt: skip
def test_gradients_are_those_of_the_unpacked_weights_to_the_bit(
    kind: dict[str, Any], piece: int | None, tiles: Sequence[Sequence[int]]
) -> None:
    expected = gradients(llama(False, **kind), tiles, piece)
    for name, grad in gradients(llama(True, **kind), tiles, piece).items():
        assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("keep", [0, 1, 2])
@pytest.mark.parametrize("tiles", [ONE_TILE, THREE_TILES], ids=["one tile", "tiles"])
def test_a_block_is_unpacked_once_in_each_direction_and_never_saved(
    unpacked: list[Any], keep: int, dora: bool, tiles: Sequence[Sequence[int]]
) -> None:
    model = llama(True, keep, dora=dora)
    loss = model(*batch(), tiles_of(model, *tiles), 1.0)
    assert len(unpacked) == MATRICES
    assert not any(numbers() is not None for numbers in unpacked), "held by the graph"
    loss.backward()
    assert len(unpacked) == 2 * MATRICES
    assert not any(numbers() is not None for numbers in unpacked)


def test_only_one_block_is_unpacked_at_a_time(unpacked: list[Any]) -> None:
    model = llama(True)
    alive: list[int] = []
    for block in model.model.layers:
        block.register_forward_pre_hook(
            lambda *_: alive.append(sum(numbers() is not None for numbers in unpacked))
        )
    model(*batch(), tiles_of(model, LENGTHS), 1.0).backward()
    assert alive == [0, 0]


def test_without_gradients_a_block_is_unpacked_once(unpacked: list[Any]) -> None:
    model = llama(True)
    token_ids, _ = batch()
    with torch.no_grad():
        found = model.logits(token_ids, tiles_of(model, *THREE_TILES))
    assert len(unpacked) == MATRICES
    plain = llama(False)
    with torch.no_grad():
        assert torch.equal(found, plain.logits(token_ids, tiles_of(plain, *THREE_TILES)))


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_blocks_input_goes_with_its_backward(keep: int) -> None:
    """What is entered around the tiles lives as long as the graph, and must not hold the input."""
    model = llama(True, keep)
    inputs: list[Any] = []
    for block in model.model.layers:
        block.register_forward_pre_hook(
            lambda _, args: inputs.append(weakref.ref(args[0].untyped_storage()))
        )
    loss = model(*batch(), tiles_of(model, *THREE_TILES), 1.0)
    assert inputs[1]() is not None
    loss.backward()
    assert inputs[1]() is None


def test_an_error_inside_a_block_frees_what_was_unpacked(unpacked: list[Any]) -> None:
    packed = Matrix(pack(torch.randn(8, 64)))
    with pytest.raises(ZeroDivisionError), unpacked_once([packed]):
        assert packed.numbers(torch.float32) is packed.numbers(torch.float32)
        raise ZeroDivisionError
    assert unpacked[0]() is None


def test_a_weight_that_is_not_packed_passes_through() -> None:
    weight = torch.randn(8, 64, dtype=torch.bfloat16)
    plain = Matrix(weight)
    with unpacked_once([plain]):
        assert plain.numbers(torch.bfloat16) is weight
    assert len(plain) == len(Matrix(pack(weight))) == 8
