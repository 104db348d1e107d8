"""The order of the documents and its cuts into steps, against slow restatements."""

from __future__ import annotations

import math

import numpy as np
import pytest

from minilora.data.schedule import Schedule


def schedule(count: int = 103, **fields: object) -> Schedule:
    lengths = np.random.default_rng(0).integers(1, 40, count)
    return Schedule(**{"lengths": lengths, "seed": 3, "rows_per_step": 8, **fields})  # type: ignore[arg-type]


def epochs_of(order: Schedule, epochs: int) -> list[list[int]]:
    step, result = 0, []
    for epoch in range(epochs):
        count = order.steps_per_epoch(epoch)
        result.append(np.concatenate([order.document_ids(step + i) for i in range(count)]).tolist())
        step += count
    return result


@pytest.mark.parametrize("packing", [False, True])
def test_epochs_are_different_permutations_and_asking_in_any_order_gives_the_same(
    packing: bool,
) -> None:
    one = schedule(packing=packing, cutoff_len=40)
    first, second, third = epochs_of(one, 3)
    for epoch in (first, second, third):
        assert sorted(epoch) == list(range(103))
    assert first != second != third != first
    expected = [one.document_ids(step).tolist() for step in range(one.total_steps)]
    for start in (one.total_steps - 1, one.steps_per_epoch(0) - 1, one.steps_per_epoch(0), 5):
        fresh = schedule(packing=packing, cutoff_len=40)
        for step in range(start, one.total_steps):
            assert fresh.document_ids(step).tolist() == expected[step]
    assert epochs_of(schedule(packing=packing, seed=4), 1)[0] != first
    assert epochs_of(schedule(disable_shuffling=True, packing=packing), 1)[0] == list(range(103))


def test_the_order_is_the_same_in_every_release() -> None:
    assert epochs_of(schedule(count=10), 2) == [
        [0, 1, 2, 7, 5, 6, 9, 8, 4, 3],
        [5, 8, 9, 6, 3, 7, 0, 1, 2, 4],
    ]


def test_without_packing_only_the_last_step_of_an_epoch_is_short() -> None:
    order = schedule()
    sizes = [len(order.document_ids(step)) for step in range(order.total_steps)]
    assert sizes == ([8] * 12 + [7]) * 3


def test_packing_takes_as_many_documents_as_fit_and_never_none() -> None:
    lengths = np.random.default_rng(1).integers(1, 40, 500)
    lengths[[7, 8, 99]] = 1000  # longer than a whole step
    order = Schedule(
        lengths, seed=1, rows_per_step=3, cutoff_len=50, packing=True, num_train_epochs=2
    )
    for epoch, documents in enumerate(epochs_of(order, 2)):
        expected: list[list[int]] = [[]]
        for row in documents:
            if expected[-1] and lengths[[*expected[-1], row]].sum() > 150:
                expected.append([])
            expected[-1].append(row)
        begin = epoch * order.steps_per_epoch(0)
        found = [
            order.document_ids(begin + i).tolist() for i in range(order.steps_per_epoch(epoch))
        ]
        assert found == expected
    assert order.total_steps == order.steps_per_epoch(0) + order.steps_per_epoch(1)


def test_total_steps_follow_fractions_of_epochs_and_max_steps() -> None:
    assert schedule(num_train_epochs=3.0).total_steps == 39
    assert schedule(num_train_epochs=2.5).total_steps == 33  # ceil(2.5 * 13)
    assert schedule(num_train_epochs=0.01).total_steps == 1
    assert schedule(count=80, num_train_epochs=1.1).total_steps == 11
    assert schedule(max_steps=100).total_steps == 100
    assert schedule(max_steps=5, num_train_epochs=30.0).total_steps == 5
    packed = schedule(packing=True, num_train_epochs=1.5, cutoff_len=40)
    assert packed.total_steps == packed.steps_per_epoch(0) + -(-packed.steps_per_epoch(1) // 2)
    assert len(schedule(max_steps=100).document_ids(99)) == 8  # the eighth epoch


@pytest.mark.parametrize("packing", [False, True])
def test_epoch_counts_up_to_whole_numbers(packing: bool) -> None:
    order = schedule(packing=packing, cutoff_len=40)
    ends = np.cumsum([order.steps_per_epoch(epoch) for epoch in range(3)])
    assert [order.epoch(int(end) - 1) for end in ends] == [1.0, 2.0, 3.0]
    values = [order.epoch(step) for step in range(order.total_steps)]
    assert values == sorted(set(values)) and values[0] == 1 / order.steps_per_epoch(0)


def test_an_empty_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="documents"):
        schedule(count=0)
    with pytest.raises(ValueError, match="rows per step"):
        schedule(rows_per_step=0)


@pytest.mark.parametrize("packing", [False, True])
def test_a_resumed_schedule_goes_on_with_the_very_next_document(packing: bool) -> None:
    lengths = np.random.default_rng(5).integers(5, 90, 47)
    fields = {"packing": packing, "cutoff_len": 60, "num_train_epochs": 2.4}
    whole = Schedule(lengths, 7, 6, **fields)
    consumed = 0
    for step in range(whole.total_steps):
        rest = Schedule(lengths, 7, 6, **fields, done_steps=step, done_rows=consumed)
        assert rest.total_steps == whole.total_steps
        for later in range(step, whole.total_steps):
            assert rest.document_ids(later).tolist() == whole.document_ids(later).tolist()
            assert rest.epoch(later) == whole.epoch(later)
        consumed += len(whole.document_ids(step))


def test_a_resumed_schedule_with_another_step_size_loses_and_repeats_no_document() -> None:
    lengths = np.full(47, 10)
    whole = Schedule(lengths, 7, 6, num_train_epochs=2)
    done = [row for step in range(3) for row in whole.document_ids(step)]
    rest = Schedule(lengths, 7, 4, num_train_epochs=2, done_steps=3, done_rows=len(done))
    later = [row for step in range(3, rest.total_steps) for row in rest.document_ids(step)]
    everything = [row for step in range(whole.total_steps) for row in whole.document_ids(step)]
    assert done + later == everything


@pytest.mark.parametrize("epochs", [0.5, 1, 1.5, 2])
def test_a_run_that_has_done_more_than_it_is_asked_for_has_no_step_left(epochs: float) -> None:
    """47 documents in steps of 6: 8 an epoch. Done are 2 steps more than asked, or 3 epochs."""
    for steps in (math.ceil(8 * epochs) + 2, 24):
        rows = steps // 8 * 47 + steps % 8 * 6
        fields = {"num_train_epochs": epochs, "done_steps": steps, "done_rows": rows}
        assert Schedule(np.full(47, 10), 7, 6, **fields).total_steps == steps
