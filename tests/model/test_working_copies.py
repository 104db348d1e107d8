"""Copies of trained parameters: the numbers are those of casting at each use."""

from __future__ import annotations

import pytest
import torch

from minilora.model.llama import Llama
from minilora.model.lora import copies_of_pairs, lora_parameters
from minilora.model.tiles import document_tiles
from minilora.model.working_copies import working
from tests.support.models import LENGTHS, adapted_llama, batch, gradients

TILES = [LENGTHS[:1], LENGTHS[1:3], LENGTHS[3:]]


def fp32_adapter_on_bf16(keep: int, dropout: float = 0.0) -> Llama:
    """As ZeRO stage 0 has it on a GPU."""
    model = adapted_llama(keep, dropout, torch.bfloat16)
    for _, parameter in lora_parameters(model):
        parameter.data = parameter.data.float()
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("keep", [0, 2])
def test_gradients_are_those_of_casting_at_each_use(keep: int, dropout: float) -> None:
    expected = gradients(fp32_adapter_on_bf16(keep, dropout), TILES)
    model = fp32_adapter_on_bf16(keep, dropout)
    copies_of_pairs(model, torch.bfloat16)
    for name, grad in gradients(model, TILES).items():
        assert grad.dtype == torch.float32 and torch.equal(grad, expected[name]), name


def test_in_pieces_gradients_differ_by_the_rounding_of_bf16() -> None:
    """The sum over the pieces of a tile is the gradient of a copy, so it is rounded."""
    expected = gradients(fp32_adapter_on_bf16(0), [LENGTHS], piece_tokens=20)
    model = fp32_adapter_on_bf16(0)
    copies_of_pairs(model, torch.bfloat16)
    for name, grad in gradients(model, [LENGTHS], piece_tokens=20).items():
        assert torch.allclose(grad, expected[name], rtol=2**-8, atol=0), name


def test_a_renewed_copy_has_the_numbers_of_its_parameter() -> None:
    model = fp32_adapter_on_bf16(0)
    copies = copies_of_pairs(model, torch.bfloat16)
    like = torch.empty(0, dtype=torch.bfloat16)
    ids, tiles = batch()[0], document_tiles(model.shape, [LENGTHS], 0, like)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model.logits(ids, tiles)

    before = logits()
    for _, parameter in lora_parameters(model):
        parameter.data.mul_(-1.5)
    assert torch.equal(logits(), before)
    copies.renew()
    for _, parameter in lora_parameters(model):
        assert torch.equal(working(parameter), parameter.bfloat16())
    assert not torch.equal(logits(), before)


def test_no_copy_is_made_where_the_dtype_is_the_same() -> None:
    model = adapted_llama()
    copies_of_pairs(model, torch.float32)
    assert all(working(parameter) is parameter for _, parameter in lora_parameters(model))
