"""The split of a step over ranks, spans and tiles, against slow restatements."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minilora.data.documents import Documents
from minilora.data.schedule import Schedule
from minilora.data.steps import Place, Step, TileLimits, build_step
from tests.support.prepared import some_documents


def steps_of_all_ranks(
    documents: Documents, rows: list[int], world_size: int, limits: TileLimits
) -> list[Step]:
    ids = np.array(rows, dtype=np.int64)
    schedule = Schedule(documents.lengths, seed=7, rows_per_step=len(ids))
    return [
        build_step(documents, ids, 3, schedule, Place(rank, world_size), limits)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("gather_tokens", [None, 60, 10])
def test_every_row_is_computed_once_with_the_labels_of_a_slow_reference(
    world_size: int, gather_tokens: int | None
) -> None:
    documents = some_documents(200, seed=world_size)
    rows = np.random.default_rng(2).choice(200, 20, replace=False).tolist()
    limits = TileLimits(tile_tokens=45, gather_tokens=gather_tokens)
    steps = steps_of_all_ranks(documents, rows, world_size, limits)

    assert sorted(np.concatenate([step.local_ids for step in steps]).tolist()) == sorted(rows)
    assert len({len(step.spans) for step in steps}) == 1
    assert gather_tokens is not None or len(steps[0].spans) == 1

    wanted, tokens, labelled = [], 0, 0
    for row in rows:
        start, end = int(documents.offsets[row]), int(documents.offsets[row + 1])
        ids = documents.tokens[start:end].tolist()
        labels = [
            int(documents.tokens[at + 1]) if at + 1 < end and documents.trained[at + 1] else -100
            for at in range(start, end)
        ]
        wanted.append((ids, labels))
        tokens += len(ids)
        labelled += sum(label != -100 for label in labels)
    found = []
    for step in steps:
        assert (step.tokens, step.labelled, step.document_ids.tolist()) == (tokens, labelled, rows)
        own = []
        for span in step.spans:
            assert span.token_ids.dtype == span.labels.dtype == torch.int64
            lengths = [length for tile in span.tiles for length in tile]
            assert sum(lengths) == len(span.token_ids) == len(span.labels)
            own += list(
                zip(
                    [part.tolist() for part in torch.split(span.token_ids, lengths)],
                    [part.tolist() for part in torch.split(span.labels, lengths)],
                    strict=True,
                )
            )
        real = own[: len(step.local_ids)]  # dummies come after all documents
        assert own[len(step.local_ids) :] == [([0], [-100])] * (len(own) - len(real))
        found += real
    assert sorted(found) == sorted(wanted)


def test_tiles_and_spans_keep_their_limits_and_only_one_longer_document_may_pass_them() -> None:
    documents = some_documents(100, seed=5)
    limits = TileLimits(tile_tokens=30, gather_tokens=70)
    for step in steps_of_all_ranks(documents, list(range(60)), 3, limits):
        for span in step.spans:
            assert len(span.token_ids) <= 70
            assert all(sum(tile) <= 30 or len(tile) == 1 for tile in span.tiles)
        tiles = [tile for span in step.spans for tile in span.tiles]
        assert max(sum(tile) for tile in tiles) > 30  # a longer document was among them
        assert max(len(tile) for tile in tiles) > 1


def test_documents_are_dealt_longest_first_to_the_rank_with_the_fewest_tokens() -> None:
    documents = Documents.of(
        [(np.zeros(n, np.int32), np.ones(n, np.bool_)) for n in (4, 7, 5, 9, 6, 8)]
    )
    steps = steps_of_all_ranks(documents, [5, 4, 3, 2, 1, 0], 2, TileLimits())
    assert [documents.lengths[step.local_ids].tolist() for step in steps] == [[9, 6, 5], [8, 7, 4]]


def test_long_documents_count_for_their_attention_too() -> None:
    """A document of 8 tokens is 8 + 64 / 4 = 24 of work, as much as six of 2 and two of 1."""
    documents = Documents.of(
        [(np.zeros(n, np.int32), np.ones(n, np.bool_)) for n in (8, 2, 2, 2, 2, 2, 2, 2, 2)]
    )
    dealt = []
    for length in (float("inf"), 4.0):
        schedule = Schedule(documents.lengths, 1, 9, break_even_length=length)
        made = build_step(documents, np.arange(9), 0, schedule, Place(0, 2), TileLimits())
        dealt.append(made.local_ids.tolist())
    assert dealt == [[0, 5, 7], [0]]


def test_of_equal_documents_the_first_is_dealt_first() -> None:
    """The order is the same on every machine: numpy's other kinds of sort are not."""
    lengths = [5 + row % 3 for row in range(40)]
    documents = Documents.of([(np.zeros(n, np.int32), np.ones(n, np.bool_)) for n in lengths])
    (step,) = steps_of_all_ranks(documents, list(range(40)), 1, TileLimits())
    assert step.local_ids.tolist() == sorted(range(40), key=lambda row: -lengths[row])


def test_a_document_goes_where_it_leaves_least_room_and_all_ranks_count_the_spans_of_all() -> None:
    documents = Documents.of(
        [(np.zeros(n, np.int32), np.ones(n, np.bool_)) for n in (6, 5, 4, 3, 2)]
    )
    (step,) = steps_of_all_ranks(documents, list(range(5)), 1, TileLimits(tile_tokens=10))
    assert step.spans[0].tiles == ((6, 4), (5, 3, 2))
    steps = steps_of_all_ranks(documents, [0, 2, 3], 2, TileLimits(6, 6))
    assert [[span.tiles for span in step.spans] for step in steps] == [
        [((6,),), ((1,),)],
        [((4,),), ((3,),)],
    ]


def test_ranks_without_documents_get_one_token_without_a_label() -> None:
    documents = some_documents(5, seed=3)
    steps = steps_of_all_ranks(documents, [4], 3, TileLimits())
    for step in steps[1:]:
        (span,) = step.spans
        assert (span.token_ids.tolist(), span.labels.tolist(), span.tiles) == ([0], [-100], ((1,),))
        assert step.local_ids.tolist() == []
        assert step.tokens == documents.lengths[4]


def test_dropout_seeds_differ_by_everything_and_never_change() -> None:
    documents = some_documents(50, seed=8)
    rows = np.arange(50)
    limits = TileLimits(gather_tokens=60)
    seeds = []
    for seed, step, rank in [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)]:
        schedule = Schedule(documents.lengths, seed, len(rows))
        built = build_step(documents, rows, step, schedule, Place(rank, 2), limits)
        assert len(built.spans) > 1
        seeds += [span.seed for span in built.spans]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[0] == 3717377837946358015
