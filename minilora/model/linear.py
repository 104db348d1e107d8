"""W x + b, with LoRA's scaling * B A x where there is a pair; backward is written by hand."""

# Shape letters: N tokens, R rank; `in` and `out` are the features.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class LoraPair(NamedTuple):
    """LoRA's two matrices, a (R, in) and b (out, R), and its scaling.

    dropped: (N, in), the input of the pair where dropout makes it another than the layer's.
    """

    a: Tensor
    b: Tensor
    scaling: float
    dropped: Tensor | None


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, pair: LoraPair | None, unread: bool = False
) -> Tensor:
    """x: (N, in); weight: (out, in), frozen like the bias (out,). Returns (N, out).

    unread: nobody looks at the numbers returned, only gradients are wanted: what is returned has
    none. The last product of a block that is computed again is such a one.
    """
    a, b, scaling, dropped = pair or (None, None, 0.0, None)
    output: Tensor = _Linear.apply(x, dropped, weight, bias, a, b, scaling, unread)  # type: ignore[no-untyped-call]
    return output


class _Linear(torch.autograd.Function):
    """Autograd would copy the large product to add the small one to it, in forward and backward.

    The products of rank R are taken with R first: on a CPU up to six times faster than R last.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, dropped, weight, bias, a, b, ctx.scaling, unread = inputs
        output = x.new_empty(len(x), len(weight)) if unread else F.linear(x, weight, bias)
        low = None
        if a is not None:
            low = a @ (x if dropped is None else dropped).T  # (R, N)
            if not unread:
                output.addmm_(low.T, b.T, alpha=ctx.scaling)
        ctx.save_for_backward(x, dropped, weight, a, b, low)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, dropped, weight, a, b, low = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_dropped = grad_a = grad_b = None
        if a is not None:
            grad_low = (b.T @ grad.T).mul_(ctx.scaling)  # (R, N)
            grad_a = grad_low @ (x if dropped is None else dropped)
            grad_b = (low @ grad).mul_(ctx.scaling).T
            if dropped is not None:
                grad_dropped = grad_low.T @ a
            elif grad_x is not None:
                grad_x.addmm_(grad_low.T, a)
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None, None
