"""SwiGLU, silu(gate) * up (Shazeer 2020, arXiv 2002.05202), with its backward written by hand."""

# Shape letters: N tokens, F MLP features.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up: (N, F). Returns (N, F)."""
    product: Tensor = _Swiglu.apply(gate, up)  # type: ignore[no-untyped-call]
    return product


class _Swiglu(torch.autograd.Function):
    """Autograd would save silu(gate) too, which is a sixth of what a whole block saves.

    Backward recomputes it from gate, which is cheap: there is no matrix product in it.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        # silu_backward multiplies what comes in with silu'(gate), here in place.
        grad_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, grad_up
