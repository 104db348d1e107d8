"""python -m benchmarks.overlap: is the next block's gather under way while a block computes?

Counts, in a later optimizer step, the blocks which have the next one's gather asked for and not yet
waited for as they begin to compute, and as they end. Alone it plays one of 7 ranks on torch's fake
process group. Under a launcher the ranks are real, and the step is timed with and without
prefetching: `deepspeed --num_gpus 7 --module benchmarks.overlap --size 8b`. A JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import memory
from benchmarks.meters import MadeUp, Pretended
from benchmarks.report import versions
from benchmarks.workloads import SIZES
from minilora.data.steps import Step
from minilora.model.recompute import Rows
from minilora.processes.world import World
from minilora.settings.settings import TrainSettings

TIMED = 3


class Watch:
    """How many elements are on their way when a block's first tile begins and its last one ends."""

    def __init__(self, engine: MadeUp) -> None:
        self.under_way = 0
        self.begun: dict[tuple[str, int], int] = {}
        self.ended: dict[tuple[str, int], int] = {}
        backend = sys.modules["deepspeed.comm.comm"].cdb
        function, watch = backend.all_gather_function, self

        class Arriving:
            def __init__(self, handle: Any, size: int) -> None:
                self.handle, self.size = handle, size
                watch.under_way += size

            def wait(self, *args: Any) -> Any:
                watch.under_way, self.size = watch.under_way - self.size, 0
                return self.handle.wait(*args)

        def gather(*, output_tensor: torch.Tensor, **others: Any) -> Any:
            handle = function(output_tensor=output_tensor, **others)
            return handle and Arriving(handle, output_tensor.numel())

        backend.all_gather_function = gather
        for index, block in enumerate(engine.model.model.layers):
            block._forward_tile = self._noting(block._forward_tile, index)  # type: ignore[assignment]

    def _noting(self, function: Any, index: int) -> Any:
        def noting(hidden: torch.Tensor, tile: Rows) -> torch.Tensor:
            moment = ("backward" if tile.graph_only else "forward", index)
            self.begun.setdefault(moment, self.under_way)
            found: torch.Tensor = function(hidden, tile)
            self.ended[moment] = self.under_way
            return found

        return noting


def count(engine: MadeUp, batch: Step) -> dict[str, int]:
    """Blocks, but for the last of each direction, with the next one's gather under way."""
    watch, last = Watch(engine), engine.shape.num_layers - 1
    shapes = engine.shape.linear_shapes().values()
    block = sum(rows * columns for rows, columns in shapes)
    for span in batch.spans:
        engine.forward_backward(span, 1.0, last=span is batch.spans[-1])
    found = {"of": last}
    for direction, indices in (("forward", range(last)), ("backward", range(1, last + 1))):
        for name, moments in (("begins", watch.begun), ("ends", watch.ended)):
            ahead = [moments[direction, index] >= block for index in indices]
            found[f"as {direction} {name}"] = sum(ahead)
    return found


def step_seconds(engine: MadeUp, batch: Step) -> float:
    """The fastest of a few optimizer steps."""
    seconds = []
    for _ in range(TIMED):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.barrier()
        began = time.monotonic()
        for span in batch.spans:
            engine.forward_backward(span, 1.0, last=span is batch.spans[-1])
        engine.step(1e-4)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
    return min(seconds)


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.overlap", description=__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), default="mid")
    parser.add_argument("--ranks", type=int, default=7, help="without a launcher")
    parser.add_argument("--no_prefetch", action="store_true", help="count without it")
    parser.add_argument("--local_rank", help="ignored; launchers give it")
    return parser.parse_args(argv)


def main() -> None:
    own = read(None)
    size, real = SIZES[own.size], "RANK" in os.environ
    on_gpu = torch.cuda.is_available()
    world = World(TrainSettings()) if real else Pretended(own.ranks, "cuda" if on_gpu else "cpu")
    if isinstance(world, World):
        world.open_device(TrainSettings())
    found: dict[str, Any] = {}
    for prefetch in (True, False) if real else (not own.no_prefetch,):
        case = memory.Case(
            bf16=on_gpu, cutoff_len=size.equal, lora_rank=size.rank, prefetch=prefetch
        )
        if not real:  # what is only counted is the same for few tokens
            case = replace(case, batch=1, accumulation=1)
        engine, batch = memory._engine(case, size, world), memory._batch(case, world)
        seconds = step_seconds(engine, batch)
        if real:
            found["step_seconds" if prefetch else "without_prefetch"] = seconds
        if prefetch or not real:
            found |= count(engine, batch)
        del engine
    if world.rank == 0:
        print(json.dumps({**versions(), "size": own.size, "ranks": world.size, **found}))


if __name__ == "__main__":
    main()
