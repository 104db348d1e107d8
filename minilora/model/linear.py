"""A linear layer W x + b, with LoRA's scaling * B A x added to it; its backward by hand."""

# Shape letters: N tokens, R rank; `in` and `out` are the layer's features.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.model.matrix import Matrix


class LoraPair(NamedTuple):
    """What LoRA adds to a layer: scaling * B A x.

    a: (R, in). b: (out, R). dropped: (N, in), what A is multiplied with in place of x where there
    is dropout; None where there is none.
    """

    a: Tensor
    b: Tensor
    scaling: float
    dropped: Tensor | None


def linear(
    x: Tensor, weight: Matrix, bias: Tensor | None, pair: LoraPair | None, graph_only: bool = False
) -> Tensor:
    """x W^T + b, and LoRA's part where there is a pair.

    x: (N, in). weight: (out, in) and bias: (out,), both frozen. Returns (N, out).
    graph_only: only gradients are wanted. The backward of a linear layer needs its input but not
    its output, so the large product is skipped, and what is returned is uninitialised memory.
    """
    a, b, scaling, dropped = pair or (None, None, 0.0, None)
    output: Tensor = _Linear.apply(x, dropped, weight, bias, a, b, scaling, graph_only)  # type: ignore[no-untyped-call]
    return output


class _Linear(torch.autograd.Function):
    """The layer as one node of the graph.

    Autograd would compute the small product of LoRA apart, and make a third large tensor to hold
    the sum of both, in forward and in backward. Here the small one is added in place.
    Products with R are computed as A x^T, (R, N), rather than as x A^T, (N, R): on a CPU that is
    up to six times faster.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, dropped, weight, bias, a, b, scaling, graph_only = inputs
        output: Tensor
        if graph_only:
            output = x.new_empty(len(x), len(weight))  # (N, out)
        else:
            output = F.linear(x, weight.numbers(x.dtype), bias)  # (N, out)

        low = None
        if a is not None:
            low_input = x if dropped is None else dropped
            low = a @ low_input.T  # (R, N)
            if not graph_only:
                output.addmm_(low.T, b.T, alpha=scaling)

        ctx.scaling = scaling
        ctx.weight = weight
        ctx.save_for_backward(x, dropped, a, b, low)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, dropped, a, b, low = ctx.saved_tensors
        grad_x = grad_dropped = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.weight.numbers(grad.dtype)  # (N, in)

        if a is not None:
            low_input = x if dropped is None else dropped
            grad_low = (b.T @ grad.T).mul_(ctx.scaling)  # (R, N)
            grad_a = grad_low @ low_input  # (R, in)
            grad_b = (low @ grad).mul_(ctx.scaling).T  # (out, R)
            if dropped is not None:
                grad_dropped = grad_low.T @ a  # (N, in)
            elif grad_x is not None:
                grad_x.addmm_(grad_low.T, a)

        # In the order of forward's inputs: x, dropped, weight, bias, a, b, scaling, graph_only.
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None, None
