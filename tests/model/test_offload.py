"""Block inputs in host memory: no bit changes, and nothing is saved twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minilora.model.lora import lora_parameters
from minilora.model.offload import HostStore
from tests.support.models import LENGTHS, adapted_llama, batch, gradients, tiles_of


@pytest.mark.parametrize("keep", [0, 1])
def test_inputs_in_host_memory_change_no_bit(keep: int) -> None:
    tiles = [LENGTHS[:2], LENGTHS[2:]]
    expected = gradients(adapted_llama(0, 0.3), tiles)
    model = adapted_llama(keep, 0.3)
    model.model.offload_inputs()
    for _ in range(2):  # the store is empty again after each step
        for _, parameter in lora_parameters(model):
            parameter.grad = None
        for name, grad in gradients(model, tiles).items():
            assert torch.equal(grad, expected[name]), name
    store = model.model.layers[0].store
    assert store is model.model.layers[1].store and store.held == [] and store.ahead is None


def test_the_host_gives_back_the_last_first() -> None:
    store = HostStore()
    tensors = [torch.full((2, 3), float(number)) for number in range(4)]
    places = [store.put(tensor) for tensor in tensors]
    for place, tensor in reversed([*zip(places, tensors, strict=True)]):
        assert torch.equal(store.take(place, like=tensor), tensor)


def test_inputs_in_host_memory_are_not_kept_twice() -> None:
    model = adapted_llama()
    saved: list[Tensor] = []
    model.model.offload_inputs()
    token_ids, _ = batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model.model(token_ids, tiles_of(model, LENGTHS))
    assert saved == []
    assert [tuple(host.shape) for host in model.model.layers[0].store.held] == [(46, 32)] * 2
