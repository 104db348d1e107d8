"""Functions with a backward written by hand, compared with autograd's of the plain equation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[..., Tensor]
SIZE = (7, 4, 6)
# Relative to the largest number of each tensor.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-2}


def check_against_autograd(mine: Function, plain: Function, count: int, dtype: torch.dtype) -> None:
    """Output and gradients of `mine` in dtype equal those of `plain` in fp64.

    count: how many inputs of SIZE both take. The output has fewer heads, or as many.
    """
    inputs = [torch.randn(SIZE, dtype=torch.float64).to(dtype) for _ in range(count)]
    wide_inputs = [tensor.double().requires_grad_() for tensor in inputs]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    found, expected = mine(*inputs), plain(*wide_inputs)
    grad = torch.randn(expected.shape, dtype=torch.float64).to(dtype)

    pairs = [(found, expected)]
    pairs += zip(
        torch.autograd.grad(found, inputs, grad),
        torch.autograd.grad(expected, wide_inputs, grad.double()),
        strict=True,
    )
    for one, other in pairs:
        assert one.dtype == dtype
        scale = float(other.abs().max())
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * scale)


def check_that_nothing_given_changes(mine: Function, count: int) -> None:
    """Neither the inputs nor the gradient that comes in, though much is computed in place."""
    inputs = [torch.randn(SIZE, requires_grad=True) for _ in range(count)]
    output = mine(*inputs)
    grad = torch.randn_like(output)
    before = [tensor.detach().clone() for tensor in (*inputs, grad)]
    torch.autograd.grad(output, inputs, grad)
    for tensor, copy in zip((*inputs, grad), before, strict=True):
        assert torch.equal(tensor, copy)
