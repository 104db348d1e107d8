"""The tokens of one optimizer step on one rank: which documents, in which spans and tiles.

Shape letters: n documents, N tokens of one span.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from minilora.data.documents import Documents, Int64s
from minilora.data.schedule import Schedule

NO_LABEL = -100  # torch's default ignore_index of cross_entropy


@dataclass(frozen=True)
class TileLimits:
    """How many tokens a block computes at a time, and how many share one gather of each block.

    gather_tokens: None for the whole step.
    """

    tile_tokens: int = 2048
    gather_tokens: int | None = None


@dataclass(frozen=True)
class Place:
    """This process among all processes of the run."""

    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class Span:
    """One flat run of whole documents, computed with one forward and backward.

    token_ids: (N,) int64. labels: (N,) int64, labels[i] is the target of position i, -100 for none.
    tiles: document lengths per tile; they sum to N. seed: for dropout.
    """

    token_ids: torch.Tensor
    labels: torch.Tensor
    tiles: tuple[tuple[int, ...], ...]
    seed: int


@dataclass(frozen=True)
class Step:
    """What one rank computes in an optimizer step: `spans`, of which every rank has equally many.

    labelled, tokens: targets and tokens of all ranks together. rows, local_rows: document ids of
    all ranks, and of this one.
    """

    spans: list[Span]
    labelled: int
    tokens: int
    rows: Int64s
    local_rows: Int64s


def build_step(
    documents: Documents,
    rows: Int64s,
    step: int,
    schedule: Schedule,
    place: Place,
    limits: TileLimits,
) -> Step:
    """This rank's part of the documents `rows`, as spans of tiles.

    Every rank works out the deal of all ranks, so they agree on the number of spans without
    communication. A span without documents holds one token without a label: collectives match, sums
    do not change.
    """
    lengths = documents.offsets[rows + 1] - documents.offsets[rows]
    shares = _deal(lengths, place.world_size, schedule.break_even_length)
    share = shares[place.rank]
    limit = limits.gather_tokens or int(lengths.sum())
    spans_wanted = max(1, *(len(_pack(lengths[other], limit)) for other in shares))
    groups = [share[group] for group in _pack(lengths[share], limit)]
    groups += [share[:0]] * (spans_wanted - len(groups))
    spans = [
        _span(
            documents, rows[group], limits.tile_tokens, _mix(schedule.seed, step, place.rank, index)
        )
        for index, group in enumerate(groups)
    ]
    positions, starts = _positions(documents, rows)
    labelled = int(documents.trained[positions].sum() - documents.trained[positions[starts]].sum())
    return Step(spans, labelled, int(lengths.sum()), rows, rows[share])


def most_tokens(schedule: Schedule, world_size: int) -> int:
    """The most tokens that one rank can have in a step, whatever the order of the documents."""
    lengths, rows = np.sort(schedule.lengths)[::-1], schedule.rows_per_step
    if not schedule.packing:
        shares = _deal(lengths[:rows], world_size, schedule.break_even_length)
        return max(int(lengths[share].sum()) for share in shares)
    # Dealt longest first, the last document of the fullest rank is its only one, or no longer
    # than each of world_size others: a share of the work, and what of it is more than that share.
    # A rank has fewer tokens than work, by a factor that is not smaller than the last document's.
    room, longest = rows * schedule.cutoff_len, int(lengths[0])
    last = min(longest, room // (world_size + 1))
    work = room * (1 + longest / schedule.break_even_length)
    share = (work + last * (world_size - 1)) / world_size
    return min(max(longest, int(share)), max(longest, room), int(lengths.sum()))


def worst_span(documents: Documents, tokens: int, limits: TileLimits) -> Span:
    """The fullest span that `tokens` of a step can make: none has more tokens, labels, a longer
    document or a larger tile. Its documents are made up: the longest one, over and over.
    """
    longest = int(documents.lengths.max())
    left = min(tokens, max(limits.gather_tokens or tokens, longest))
    numbers = np.resize(documents.tokens[:left], left).astype(np.int64)
    labelled = int(np.ceil(left * (documents.labelled / documents.lengths).max()))
    targets = np.where(np.arange(left) < labelled, numbers, NO_LABEL)
    tiles = []
    while left:
        room = min(left, max(limits.tile_tokens, longest))
        left -= room
        whole, rest = divmod(room, longest)
        tiles.append((longest,) * whole + (rest,) * (rest > 0))
    return Span(torch.from_numpy(numbers), torch.from_numpy(targets), tuple(tiles), seed=0)


def _deal(lengths: Int64s, world_size: int, break_even_length: float) -> list[Int64s]:
    """Indices into `lengths` for every rank: longest first, each to the rank with least work."""
    work = lengths + lengths * lengths / break_even_length
    loads = [(0.0, rank) for rank in range(world_size)]
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for index in np.argsort(-lengths, kind="stable").tolist():
        load, rank = loads.pop(0)
        shares[rank].append(index)
        insort(loads, (load + float(work[index]), rank))
    return [np.array(share, dtype=np.int64) for share in shares]


def _pack(lengths: Iterable[int], limit: int) -> list[list[int]]:
    """Indices into `lengths`, best fit in bins of `limit` tokens (or one longer document)."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens still free, bin), sorted
    for index, length in enumerate(lengths):
        at = bisect_left(rooms, (int(length), -1))
        room, chosen = rooms.pop(at) if at < len(rooms) else (limit, len(bins))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(index)
        insort(rooms, (room - int(length), chosen))
    return bins


def _span(documents: Documents, rows: Int64s, tile_tokens: int, seed: int) -> Span:
    """The span of these documents, tile after tile; without documents one token without a label."""
    if len(rows) == 0:
        return Span(torch.zeros(1, dtype=torch.int64), torch.full((1,), NO_LABEL), ((1,),), seed)
    lengths = documents.offsets[rows + 1] - documents.offsets[rows]
    tiles = _pack(lengths, tile_tokens)
    positions, starts = _positions(documents, rows[[index for tile in tiles for index in tile]])
    tokens = documents.tokens[positions].astype(np.int64)  # (N,)
    targets = np.where(documents.trained[positions], tokens, NO_LABEL)  # (N,)
    targets[starts] = NO_LABEL  # nothing in its own document comes before a first token
    labels = np.append(targets[1:], NO_LABEL)
    shape = tuple(tuple(int(lengths[index]) for index in tile) for tile in tiles)
    return Span(torch.from_numpy(tokens), torch.from_numpy(labels), shape, seed)


def _positions(documents: Documents, rows: Int64s) -> tuple[Int64s, Int64s]:
    """Where the tokens of these documents lie, (N,), and where in those each document starts."""
    lengths = documents.offsets[rows + 1] - documents.offsets[rows]
    starts = np.cumsum(lengths) - lengths
    shift = np.repeat(documents.offsets[rows] - starts, lengths)
    return shift + np.arange(len(shift)), starts


def _mix(*numbers: int) -> int:
    """One number of 63 bits from several, the same on every machine and in every process."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
