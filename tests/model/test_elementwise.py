"""Backward passes written by hand against autograd's of the plain equations, elementwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.model.attention import causal_attention
from minilora.model.rope import rotate
from minilora.model.swiglu import swiglu

Function = Callable[..., Tensor]


def plain_rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """As transformers writes it."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def turned(function: Function) -> Function:
    angles = torch.arange(21, dtype=torch.float64).view(7, 1, 3).repeat(1, 1, 2)
    return lambda x: function(x, (angles.cos().to(x.dtype), angles.sin().to(x.dtype)))


def attending(slices: bool) -> Function:
    """Documents of 4, 1 and 2 tokens, 2 heads and 1 kv head, cut out of one tensor."""

    def attend(x: Tensor) -> Tensor:
        query, key, value = x[:, :2], x[:, 2:3], x[:, 3:]
        if not slices:
            return causal_attention(query, key, value, (4, 1, 2), torch.tensor([0, 4, 5, 7]))
        found = []
        for start, end in ((0, 4), (4, 5), (5, 7)):
            q, k, v = (part[start:end].transpose(0, 1) for part in (query, key, value))
            scores = (q @ k.transpose(1, 2)) / x.shape[-1] ** 0.5  # (heads, N, N)
            ahead = torch.ones(end - start, end - start).triu(1).bool()
            found.append((scores.masked_fill(ahead, float("-inf")).softmax(-1) @ v).transpose(0, 1))
        return torch.cat(found)

    return attend


CASES: dict[str, tuple[Function, Function, int]] = {
    "rotate": (turned(rotate), turned(plain_rotate), 1),
    "swiglu": (swiglu, lambda gate, up: F.silu(gate) * up, 2),
    "attention": (attending(slices=False), attending(slices=True), 1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_autograds(name: str, dtype: torch.dtype) -> None:
    mine, plain, count = CASES[name]
    exact = [torch.randn(7, 4, 6, dtype=torch.float64) for _ in range(count + 1)]
    *inputs, grad = (tensor.to(dtype).requires_grad_() for tensor in exact)
    *theirs, wide = (tensor.detach().double().requires_grad_() for tensor in (*inputs, grad))
    found, expected = mine(*inputs), plain(*theirs)
    pairs = [(found, expected)]
    grad, wide = grad[:, : found.shape[1]].detach(), wide[:, : found.shape[1]].detach()
    pairs += zip(
        torch.autograd.grad(found, inputs, grad),
        torch.autograd.grad(expected, theirs, wide),
        strict=True,
    )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype]
    for one, other in pairs:
        assert one.dtype == dtype
        scale = float(other.abs().max())
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("name", CASES)
def test_inputs_and_incoming_gradients_stay_as_they_are(name: str) -> None:
    mine, _, count = CASES[name]
    inputs = [torch.randn(7, 4, 6, requires_grad=True) for _ in range(count)]
    output = mine(*inputs)
    grad = torch.randn_like(output)
    before = [tensor.detach().clone() for tensor in (*inputs, grad)]
    torch.autograd.grad(output, inputs, grad)
    for tensor, copy in zip((*inputs, grad), before, strict=True):
        assert torch.equal(tensor, copy)
