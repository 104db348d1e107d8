"""Rows to conversations, good ones and bad ones."""

from pathlib import Path
from typing import Any

import pytest

from minilora.data.conversations import Turn
from minilora.data.datasets import Tally
from tests.support.bad_rows import BAD_MESSAGES
from tests.support.rows import (
    ALPACA,
    ALPACA_TURNS,
    OPENAI,
    OPENAI_TURNS,
    SHAREGPT,
    SHAREGPT_TURNS,
    Pairs,
    problems_of,
    read,
    turns,
    write,
)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [(ALPACA, ALPACA_TURNS), (SHAREGPT, SHAREGPT_TURNS), (OPENAI, OPENAI_TURNS)],
    ids=["alpaca", "sharegpt", "openai"],
)
def test_a_bare_file_is_read_by_its_columns(
    suffix: str, rows: list[Any], expected: list[Pairs], tmp_path: Path
) -> None:
    path = write(tmp_path / f"data{suffix}", rows)
    found, tally = read([path], tmp_path)
    assert turns(found) == expected
    assert (tally.kept, tally.dropped) == (len(rows), {})
    place = f"{path}:1" if suffix == ".jsonl" else f"{path} row 1"
    assert found[0].source == place
    assert read([path.name], tmp_path)[0] == found  # a path may be relative to dataset_dir


@pytest.mark.parametrize(("row", "reason"), BAD_MESSAGES)
def test_bad_rows_are_dropped_with_a_reason_and_their_place(
    row: Any, reason: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "data.jsonl", [SHAREGPT[0], row])
    found, tally = read([path], tmp_path)
    assert turns(found) == SHAREGPT_TURNS[:1]
    assert tally == Tally(1, {reason: (f"{path}:2",)})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "q"}, "no output"),
        ({"instruction": 3, "output": "a"}, "a value is not text"),
        ({"instruction": "q", "output": ["a"]}, "a value is not text"),
        (
            {"instruction": "q", "output": "a", "history": [["x"]]},
            "history is not a list of [question, answer]",
        ),
    ],
)
def test_bad_alpaca_rows_are_dropped_too(row: Any, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", [ALPACA[0], row])
    found, tally = read([path], tmp_path)
    assert turns(found) == ALPACA_TURNS[:1]
    assert tally == Tally(1, {reason: (f"{path} row 2",)})


def test_a_few_bad_rows_pass_but_not_more_than_five_and_one_percent(tmp_path: Path) -> None:
    good, bad = ALPACA[0], {"instruction": "q"}
    path = tmp_path / "data.jsonl"
    for total, broken, passes in ((20, 5, True), (20, 6, False), (800, 8, True), (800, 9, False)):
        write(path, [bad] * broken + [good] * (total - broken))
        if passes:
            assert read([path], tmp_path)[1].kept == total - broken
        else:
            (problem,) = problems_of([path], tmp_path)
            assert problem == (
                f"too many unusable rows (over 1 %): {total - broken} rows used, {broken} dropped; "
                f"{broken}: no output ({path}:1, {path}:2, {path}:3, ...)"
            )
    write(path, [{**bad, "output": None}])
    (problem,) = problems_of([path], tmp_path)
    assert problem.startswith("no usable rows: ")


def test_tallies_of_two_stages_join() -> None:
    first = Tally(5, {"a": ("1", "2"), "b": ("3",)})
    joined = first.then(Tally(3, {"b": ("7",), "c": ("9",)}))
    assert joined == Tally(3, {"a": ("1", "2"), "b": ("3", "7"), "c": ("9",)})
    assert joined.summary() == "3 rows used, 5 dropped; 2: a (1, 2); 2: b (3, 7); 1: c (9)"
    assert Tally(4, {}).summary() == "4 rows used, 0 dropped"


def test_datasets_keep_their_order(tmp_path: Path) -> None:
    one = write(tmp_path / "one.json", ALPACA[:1])
    two = write(tmp_path / "two.json", ALPACA[1:2])
    found, _ = read([two, one, two], tmp_path)
    assert turns(found) == [ALPACA_TURNS[1], ALPACA_TURNS[0], ALPACA_TURNS[1]]
    assert found[0].turns[0] == Turn("system", "S")
