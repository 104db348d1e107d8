"""What a run does by itself with memory that is left over, where the settings leave it open."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from math import log2
from typing import NamedTuple

from minilora.memory.job import MemoryJob
from minilora.memory.peak import peak_memory
from minilora.memory.ways import TILES
from minilora.settings.settings import Settings

# How much a run leaves free when it decides by itself how many blocks save their activations. On a
# GPU (True) 15 %: a wrong guess would end a run that nobody asked to be so tight. On a CPU (False)
# half: other programs use the machine's memory too, and it may not start to swap.
SPARE = {False: 0.5, True: 0.15}
# What a tile twice as large is worth, as a share of the blocks: so many more may be recomputed for
# it. On a GPU the host starts some 150 kernels for each tile of a block. In tiles of 2,048 tokens
# it takes longer to start them than a fast GPU to compute them; in tiles of 8,192 it does not. A
# sixteenth of the blocks costs 2 % more FLOPs.
WORTH = 1 / 16


class Open(NamedTuple):
    """What the settings leave to the run.

    blocks: how many blocks save their activations; tiles: how many tokens a block computes at a
    time. Whether the step is cut into spans is open where gather_tokens is None.
    """

    blocks: bool = True
    tiles: bool = True

    @classmethod
    def of(cls, settings: Settings) -> Open:
        return cls(settings.keeps_what_fits, settings.train.tile_tokens is None)


def use_spare_memory(job: MemoryJob, limit: int, left_open: Open) -> MemoryJob:
    """The same step with the most blocks that save their activations and leave SPARE free.

    On a GPU larger tiles are tried too, see WORTH. Where weights are not gathered, a step in spans
    of a tile each costs nothing. So if the user has not set gather_tokens, the step is cut where
    more blocks can save their activations then.
    """
    most = (1 - SPARE[job.on_gpu]) * limit
    ways = list(_tiles_and_spans(job, left_open))
    if left_open.blocks:
        ways = [_with_most_blocks(way, most) for way in ways]
    fitting = [way for way in ways if peak_memory(way).total <= most]
    layers = job.shape.num_layers

    def worth(way: MemoryJob) -> float:
        return way.keep_blocks / layers + WORTH * log2(min(way.tile_tokens, way.span))

    # Of equal ones the first, which changes least.
    return max(fitting, key=worth, default=job)


def _tiles_and_spans(job: MemoryJob, left_open: Open) -> Iterator[MemoryJob]:
    """The job itself, and what may take its place, smaller tiles first."""
    tiles = [job.tile_tokens]
    if left_open.tiles and job.on_gpu:
        tiles += [tile for tile in TILES if job.tile_tokens < tile <= (job.gather_tokens or tile)]
    gathers_nothing = job.zero.stage < 3 or job.ranks == 1
    cut = left_open.blocks and job.gather_tokens is None and gathers_nothing
    for tile in tiles:
        yield replace(job, tile_tokens=tile)
        if cut:
            yield replace(job, tile_tokens=tile, gather_tokens=tile)


def _with_most_blocks(job: MemoryJob, most: float) -> MemoryJob:
    """The job with the most blocks that save their activations within `most` bytes."""

    def needs(count: int) -> int:
        return peak_memory(replace(job, keep_blocks=count)).total

    counts = range(job.shape.num_layers + 1)
    return replace(job, keep_blocks=max(0, bisect_right(counts, most, key=needs) - 1))
