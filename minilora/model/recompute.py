"""Activation checkpointing, written by hand: a block of the model as one node of autograd's graph.

Backward needs the activations of forward, and to save them all takes far more memory than to save
the input of each block. So `recompute` saves a block's input only. In backward it computes the
block's forward once more, this time with autograd's graph, and goes back through that graph; the
price is one more forward of each block. Where memory allows, `save_activations` saves the graph
of the first forward instead. Both give the same gradients, to the last bit.

A block is computed tile by tile, a tile being some rows of the flat token axis, so that only one
tile's activations exist at a time. Tiles do not change the gradient: the rows of one tile do not
depend on those of another, as no document lies in two tiles. The loss is therefore a sum over
tiles, and its gradient is the sum of the tiles' gradients.

The trained parameters are explicit inputs of the function, because autograd asks a function only
for the gradients of its inputs. Each parameter's gradient is summed over the tiles in here and
returned once per call, because DeepSpeed reduces a gradient over the GPUs as soon as it arrives:
with one gradient per tile, the second would come too late.
"""

# Shape letters: N tokens, D model.

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from minilora.model.offload import HostStore
from minilora.model.working_copies import working


class Rows(Protocol):
    """A run of rows of the flat token axis. To be recomputed it has to be a dataclass.

    graph_only: whether the body is called for its graph alone. Backward passes the body a copy of
    the tile that says so. Nobody looks at the numbers that the body then returns, so it may leave
    out what only they depend on.
    """

    @property
    def rows(self) -> slice: ...

    @property
    def graph_only(self) -> bool: ...


AnyRows = TypeVar("AnyRows", bound=Rows)
# What is computed for each tile: its rows of the input, (n, D), and the tile, to (n, D).
Body: TypeAlias = Callable[[Tensor, AnyRows], Tensor]
# Makes what is entered around all tiles, once in forward and once in backward. It lives as long as
# the graph, so it must not hold `hidden`, which would then outlive its own backward.
Around: TypeAlias = Callable[[], AbstractContextManager[None]]


def recompute(
    body: Body[AnyRows],
    hidden: Tensor,
    tiles: Sequence[AnyRows],
    parameters: Sequence[Tensor],
    store: HostStore | None = None,
    around: Around = nullcontext,
) -> Tensor:
    """Run `body` over each tile of `hidden`, saving nothing but `hidden` for backward.

    hidden: (N, D), and so is what is returned. tiles: they cover the rows in order. parameters:
    those of the body that are trained; their gradients are summed over tiles in fp32. store: saves
    hidden in host memory, if given; backward must then visit the calls in reverse order. around:
    makes what is entered around all tiles, once in forward and once in backward.
    """
    task = _Task(body, tiles, around, store, save_graphs=False)
    output: Tensor = _Recompute.apply(task, hidden, *parameters)  # type: ignore[no-untyped-call]
    return output


def save_activations(
    body: Body[AnyRows],
    hidden: Tensor,
    tiles: Sequence[AnyRows],
    parameters: Sequence[Tensor],
    around: Around = nullcontext,
) -> Tensor:
    """The same as `recompute`, to the bit, but saving all that `body` needs for backward."""
    task = _Task(body, tiles, around, None, save_graphs=True)
    output: Tensor = _Recompute.apply(task, hidden, *parameters)  # type: ignore[no-untyped-call]
    return output


class _Task(NamedTuple):
    """What is computed; save_graphs tells whether forward's graphs are saved, or its input."""

    body: Any
    tiles: Any
    around: Around
    store: HostStore | None
    save_graphs: bool


class _Graph(NamedTuple):
    """The graph of one tile: its input, and its end, which holds no tensor of the output."""

    input: Tensor
    end: GradientEdge


class _Recompute(torch.autograd.Function):
    """A body over tiles as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, task: _Task, hidden: Tensor, *parameters: Tensor) -> Tensor:
        body, tiles, around, store, _ = ctx.task = task
        ctx.parameters = parameters
        output = torch.empty_like(hidden)

        if task.save_graphs:
            ctx.graphs = []
            with around():
                for tile in tiles:
                    output[tile.rows], graph = _forward_with_graph(body, hidden, tile)
                    ctx.graphs.append(graph)
            return output

        if store is None:
            ctx.save_for_backward(hidden)
        else:
            ctx.place = store.put(hidden)

        with around():
            for tile in tiles:
                # graph_only in forward: the pieces of a tile that is itself being recomputed.
                if not tile.graph_only:
                    output[tile.rows] = body(hidden[tile.rows], tile)

        if store is not None:
            # Whoever called may free hidden next, so its copy to host memory must be done by then.
            store.settle()
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        task: _Task = ctx.task
        hidden: Any = None  # not needed where graphs are saved: each has its part as its input
        if task.store is not None:
            hidden = task.store.take(ctx.place, like=grad_output)
        elif not task.save_graphs:
            (hidden,) = ctx.saved_tensors

        grad_hidden = torch.empty_like(grad_output)
        sums: list[Tensor] = []
        with task.around():
            for tile in task.tiles:
                if task.save_graphs:
                    # Taken off the list, so that hidden is free when its last tile is done.
                    graph = ctx.graphs.pop(0)
                else:
                    # The output is dropped at once, before memory is needed for the gradients.
                    for_graph = replace(tile, graph_only=True)
                    graph = _forward_with_graph(task.body, hidden, for_graph)[1]

                inputs = (graph.input, *map(working, ctx.parameters))
                grad_input, *grads = torch.autograd.grad(graph.end, inputs, grad_output[tile.rows])

                grad_hidden[tile.rows] = grad_input
                # Sums in fp32: in bf16 a long sum loses what is small beside it, 256 + 1 is 256.
                if not sums:
                    sums = [grad.float() for grad in grads]
                else:
                    torch._foreach_add_(sums, [grad.float() for grad in grads])

        in_their_dtype = [
            grad.to(parameter.dtype) for grad, parameter in zip(sums, ctx.parameters, strict=True)
        ]
        return None, grad_hidden, *in_their_dtype


def _forward_with_graph(body: Any, hidden: Tensor, tile: Any) -> tuple[Tensor, _Graph]:
    """The body's output for one tile, and a graph of its own that ends there.

    The graph's input is cut off from whatever computed hidden: backward stops at it.
    """
    with torch.enable_grad():
        tile_input = hidden[tile.rows].detach().requires_grad_()
        tile_output = body(tile_input, tile)
    return tile_output, _Graph(tile_input, get_gradient_edge(tile_output))
