"""The tokens of one optimizer step on one rank: which documents, in which spans and tiles.

How a step is cut up, with the numbers of the article's job on each rank: 16 documents of 2,048
tokens (per_device_train_batch_size 4 x gradient_accumulation_steps 4), gather_tokens 8,192:

    step    32,768 tokens  what a rank computes between two updates of the trained weights
    span     8,192 tokens  one forward and backward through the model. Each block's weights are
                           gathered for it once in each direction. Four per step.
    tile     2,048 tokens  whole documents that a block computes at one time. Four per span.
    piece    2,048 tokens  tokens of a tile that the MLP computes at one time. One per tile, but
                           more where a document is longer than tile_tokens.
    chunk    1,024 tokens  tokens whose logits exist at one time in the loss. Up to eight per span.

This file cuts steps into spans and spans into tiles. Documents are never cut here, and nothing is
padded. model/tiles.py cuts tiles into pieces, and model/loss.py cuts spans into chunks. Without
gather_tokens a step is one span.

Every rank has equally many spans. The ranks gather a block's weights together, so each of them has
to ask for a block exactly as often as the others. If one rank had a span less, the others would
wait in vain for its part of the next gather.

Shape letters: n documents, N tokens of one span.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from minilora.data.documents import Documents, Int64s
from minilora.data.schedule import Schedule

NO_LABEL = -100  # torch's default ignore_index of cross_entropy


@dataclass(frozen=True)
class TileLimits:
    """How many tokens a block computes at a time, and how many share one gather of each block.

    A single document that is longer than a limit may pass it. gather_tokens: None for the whole
    step.
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

    labelled, tokens: targets and tokens of all ranks together. document_ids, local_ids: those of
    all ranks, and of this one, int64.
    """

    spans: list[Span]
    labelled: int
    tokens: int
    document_ids: Int64s
    local_ids: Int64s


def build_step(
    documents: Documents,
    document_ids: Int64s,
    step: int,
    schedule: Schedule,
    place: Place,
    limits: TileLimits,
) -> Step:
    """This rank's part of the documents `document_ids`, as spans of tiles.

    step: the global number of the optimizer step, from which dropout seeds are made.
    """
    # Every rank works out what all ranks get, so they agree on the number of spans without a
    # message between them.
    lengths = documents.offsets[document_ids + 1] - documents.offsets[document_ids]
    shares = _deal(lengths, place.world_size, schedule.break_even_length)
    limit = limits.gather_tokens or int(lengths.sum())
    spans_wanted = max(1, *(len(_pack(lengths[share], limit)) for share in shares))

    # A rank whose documents fill fewer spans gets spans without documents for the rest.
    own = shares[place.rank]
    groups = [own[group] for group in _pack(lengths[own], limit)]
    while len(groups) < spans_wanted:
        groups.append(own[:0])

    spans = []
    for index, group in enumerate(groups):
        seed = _mix(schedule.seed, step, place.rank, index)
        spans.append(_span(documents, document_ids[group], limits.tile_tokens, seed))

    # The first token of a document is no target, whatever its mask says (`Documents.labelled`).
    positions, starts = _positions(documents, document_ids)
    trained = documents.trained[positions]
    labelled = int(trained.sum() - trained[starts].sum())
    return Step(spans, labelled, int(lengths.sum()), document_ids, document_ids[own])


def most_tokens(schedule: Schedule, world_size: int) -> int:
    """The most tokens that one rank can have in a step, whatever the order of the documents.

    With packing it is an upper bound. Without packing it is what a rank gets of the longest
    documents, which is the most where break_even_length is infinite. Where it is finite, a rank
    with shorter documents can have a little more: in random trials 0.5 % more where the longest
    document had a tenth of break_even_length, and 11 % more where it had all of it.
    """
    lengths = np.sort(schedule.lengths)[::-1]
    longest = int(lengths[0])
    if not schedule.packing:
        shares = _deal(lengths[: schedule.rows_per_step], world_size, schedule.break_even_length)
        return max(int(lengths[share].sum()) for share in shares)

    # A step has at most `room` tokens, or else it is one longer document.
    room = schedule.rows_per_step * schedule.cutoff_len

    # A document goes to the rank with the least work, so before a rank gets its last document it
    # has at most an equal share of the work of all other documents. Counted in tokens it has less
    # than that, because a token is at least one unit of work. No token is more work than one of
    # the longest document, which bounds the work of a step. (See `_work`.)
    work = room * (1 + longest / schedule.break_even_length)

    # Documents are dealt longest first, so a rank gets a second one only after every rank has one
    # that is no shorter. Then world_size + 1 documents of at least its length are in `room`.
    last = min(longest, room // (world_size + 1))
    share = int((work + last * (world_size - 1)) / world_size)  # (work - last) / world_size + last

    # A rank that gets only one document has at most the longest one.
    return min(max(longest, share), max(longest, room), int(lengths.sum()))


def worst_span(documents: Documents, tokens: int, limits: TileLimits) -> Span:
    """The fullest span that `tokens` of a step can make, to try beforehand whether it fits.

    No span has more tokens, more labels, a longer document or a larger tile. It is made up: all
    documents but the last are as long as the longest one, and the token ids are the first ones of
    the data, over and over.
    """
    longest = int(documents.lengths.max())
    size = min(tokens, max(limits.gather_tokens or tokens, longest))
    token_ids = np.resize(documents.tokens[:size], size).astype(np.int64)

    # The share of labels in several documents is at most the largest share in one of them.
    labelled = int(np.ceil(size * (documents.labelled / documents.lengths).max()))
    labels = np.where(np.arange(size) < labelled, token_ids, NO_LABEL)

    tiles: list[tuple[int, ...]] = []
    left = size
    while left > 0:
        tile = min(left, max(limits.tile_tokens, longest))
        left -= tile
        whole, rest = divmod(tile, longest)
        lengths = [longest] * whole
        if rest > 0:
            lengths.append(rest)
        tiles.append(tuple(lengths))
    return Span(torch.from_numpy(token_ids), torch.from_numpy(labels), tuple(tiles), seed=0)


def _work(lengths: Int64s, break_even_length: float) -> NDArray[np.float64]:
    """What documents cost to compute, in the cost of one token's matrix products: (n,) float64.

    The cost of attention grows with the square of the length.
    """
    return lengths + lengths * lengths / break_even_length


def _deal(lengths: Int64s, world_size: int, break_even_length: float) -> list[Int64s]:
    """Indices into `lengths` for every rank: longest first, each to the rank with least work."""
    work = _work(lengths, break_even_length)
    loads = [(0.0, rank) for rank in range(world_size)]  # sorted
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for index in np.argsort(-lengths, kind="stable").tolist():
        load, rank = loads.pop(0)
        shares[rank].append(index)
        insort(loads, (load + float(work[index]), rank))
    return [np.array(share, dtype=np.int64) for share in shares]


def _pack(lengths: Iterable[int], limit: int) -> list[list[int]]:
    """Indices into `lengths`, in bins of at most `limit` tokens, or of one longer document.

    Each goes where it leaves the least room (best fit), or else into a new bin.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens still free, bin), sorted
    for index, length in enumerate(lengths):
        at = bisect_left(rooms, (int(length), -1))  # the first bin with enough room
        if at < len(rooms):
            room, chosen = rooms.pop(at)
        else:
            room, chosen = limit, len(bins)
            bins.append([])

        bins[chosen].append(index)
        insort(rooms, (room - int(length), chosen))
    return bins


def _span(documents: Documents, document_ids: Int64s, tile_tokens: int, seed: int) -> Span:
    """The span of these documents, tile after tile."""
    if len(document_ids) == 0:
        # One token without a label: the collectives are those of any span, and no sum changes.
        return Span(torch.zeros(1, dtype=torch.int64), torch.full((1,), NO_LABEL), ((1,),), seed)
    lengths = documents.offsets[document_ids + 1] - documents.offsets[document_ids]
    tiles = _pack(lengths, tile_tokens)
    in_order = [index for tile in tiles for index in tile]
    positions, starts = _positions(documents, document_ids[in_order])

    # The label of a position is the next token. The first token of a document is nobody's label,
    # since nothing in its own document stands before it.
    tokens = documents.tokens[positions].astype(np.int64)  # (N,)
    targets = np.where(documents.trained[positions], tokens, NO_LABEL)  # (N,)
    targets[starts] = NO_LABEL
    labels = np.append(targets[1:], NO_LABEL)

    tile_lengths = tuple(tuple(int(lengths[index]) for index in tile) for tile in tiles)
    return Span(torch.from_numpy(tokens), torch.from_numpy(labels), tile_lengths, seed)


def _positions(documents: Documents, document_ids: Int64s) -> tuple[Int64s, Int64s]:
    """Where the tokens of these documents lie, (N,), and where in those each document starts."""
    lengths = documents.offsets[document_ids + 1] - documents.offsets[document_ids]
    starts = np.cumsum(lengths) - lengths
    shift = np.repeat(documents.offsets[document_ids] - starts, lengths)
    return shift + np.arange(len(shift)), starts


def _mix(*numbers: int) -> int:
    """One number of 63 bits from several, the same on every machine and in every process."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
