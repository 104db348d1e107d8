"""Activation checkpointing by hand: keep a block's input, compute the rest again in backward."""

# Shape letters: N tokens, D model.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.model.offload import HostStore


class Rows(Protocol):
    """A run of rows of the flat token axis."""

    @property
    def rows(self) -> slice: ...


Tile_ = TypeVar("Tile_", bound=Rows, contravariant=True)
Tile = TypeVar("Tile", bound=Rows)


class Body(Protocol[Tile_]):
    """What is computed again. `unread`: only its graph is wanted, its numbers may be any."""

    def __call__(self, hidden: Tensor, tile: Tile_, /, unread: bool = False) -> Tensor: ...


def recompute(
    body: Body[Tile],
    hidden: Tensor,
    tiles: Sequence[Tile],
    parameters: Sequence[Tensor],
    store: HostStore | None = None,
    unread: bool = False,
) -> Tensor:
    """Run `body` over each tile of `hidden`, saving nothing but `hidden` for backward.

    hidden: (N, D); tiles: cover its rows in order; parameters: what of `body` is trained; store:
    keeps hidden in host memory meanwhile, for calls whose backward order is the reverse; unread:
    only the graph is wanted, what is returned may hold any numbers. Returns (N, D).
    Each parameter's gradient is summed over the tiles in fp32 and returned once, so that a hook on
    it (DeepSpeed's reduction) fires once per call however many tiles there are.
    """
    output: Tensor = _Recompute.apply(body, tiles, store, unread, hidden, *parameters)  # type: ignore[no-untyped-call]
    return output


class _Recompute(torch.autograd.Function):
    """One forward without a graph; in backward tile by tile a forward with one, and its gradients.

    The trained parameters are inputs of the function for two reasons: autograd asks for gradients
    only through inputs, and DeepSpeed's ZeRO-3 must see one AccumulateGrad per parameter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        body: Any,
        tiles: Any,
        store: Any,
        unread: bool,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.body, ctx.tiles, ctx.store, ctx.parameters = body, tiles, store, parameters
        if store is None:
            ctx.save_for_backward(hidden)
        elif any(ctx.needs_input_grad):
            ctx.place = store.put(hidden)
        output = torch.empty_like(hidden)
        for tile in () if unread else tiles:
            output[tile.rows] = body(hidden[tile.rows], tile)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.store is None:
            (hidden,) = ctx.saved_tensors
        else:
            hidden = ctx.store.take(ctx.place, like=grad_output)
        grad_hidden = torch.empty_like(hidden)
        sums: list[Tensor] = []
        for tile in ctx.tiles:
            with torch.enable_grad():
                tile_input = hidden[tile.rows].detach().requires_grad_()
                tile_output = ctx.body(tile_input, tile, unread=True)
            inputs = (tile_input, *ctx.parameters)
            grad_input, *grads = torch.autograd.grad(tile_output, inputs, grad_output[tile.rows])
            grad_hidden[tile.rows] = grad_input
            if not sums:
                sums = [grad.float() for grad in grads]
            else:
                torch._foreach_add_(sums, [grad.float() for grad in grads])
        trained = (
            grad.to(parameter.dtype) for grad, parameter in zip(sums, ctx.parameters, strict=True)
        )
        return None, None, None, None, grad_hidden, *trained
