"""Activation checkpointing by hand: keep a block's input, compute the rest again in backward.

Or keep its activations, by the same contract and with the same numbers, where memory allows.
"""

# Shape letters: N tokens, D model.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

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


def keep(
    body: Body[Tile], hidden: Tensor, tiles: Sequence[Tile], parameters: Sequence[Tensor]
) -> Tensor:
    """The same as `recompute`, to the bit, but saving all that `body` needs for backward."""
    output: Tensor = _Keep.apply(body, tiles, hidden, *parameters)  # type: ignore[no-untyped-call]
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
        else:
            ctx.place = store.put(hidden)
        output = torch.empty_like(hidden)
        for tile in () if unread else tiles:
            output[tile.rows] = body(hidden[tile.rows], tile)
        if store is not None:
            store.settle()  # before hidden is let go
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.store is None:
            (hidden,) = ctx.saved_tensors
        else:
            hidden = ctx.store.take(ctx.place, like=grad_output)

        def graphs() -> Iterator[tuple[Tensor, GradientEdge]]:
            for tile in ctx.tiles:
                yield _forward_with_graph(ctx.body, hidden, tile, unread=True)[1:]

        return (*[None] * 4, *_backward(graphs(), ctx.tiles, ctx.parameters, grad_output))


class _Keep(torch.autograd.Function):
    """A forward with a graph for each tile, which backward goes through."""

    @staticmethod
    def forward(ctx: Any, body: Any, tiles: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.tiles, ctx.parameters, ctx.graphs = tiles, parameters, []
        output = torch.empty_like(hidden)
        for tile in tiles:
            output[tile.rows], *graph = _forward_with_graph(body, hidden, tile)
            ctx.graphs.append(graph)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        graphs = (ctx.graphs.pop(0) for _ in ctx.tiles)  # a tile's input goes with its graph
        return None, None, *_backward(graphs, ctx.tiles, ctx.parameters, grad_output)


def _forward_with_graph(
    body: Any, hidden: Tensor, tile: Any, unread: bool = False
) -> tuple[Tensor, Tensor, GradientEdge]:
    """The tile's output; its graph's input, and the graph's end, which holds no tensor."""
    with torch.enable_grad():
        tile_input = hidden[tile.rows].detach().requires_grad_()
        tile_output = body(tile_input, tile, unread)
    return tile_output, tile_input, get_gradient_edge(tile_output)


def _backward(
    graphs: Iterable[tuple[Tensor, GradientEdge]],
    tiles: Sequence[Any],
    parameters: Sequence[Tensor],
    grad_output: Tensor,
) -> Iterator[Tensor]:
    """The gradients of hidden and of each parameter, tile by tile."""
    grad_hidden = torch.empty_like(grad_output)
    sums: list[Tensor] = []
    for tile, (tile_input, end) in zip(tiles, graphs, strict=True):
        inputs = (tile_input, *parameters)
        grad_input, *grads = torch.autograd.grad(end, inputs, grad_output[tile.rows])
        grad_hidden[tile.rows] = grad_input
        if not sums:
            sums = [grad.float() for grad in grads]
        else:
            torch._foreach_add_(sums, [grad.float() for grad in grads])
    yield grad_hidden
    for grad, parameter in zip(sums, parameters, strict=True):
        yield grad.to(parameter.dtype)
