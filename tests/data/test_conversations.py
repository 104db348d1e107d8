"""One row to a conversation; why a row cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minilora.data.datasets import Tally
from tests.support.bad_rows import BAD_MESSAGES
from tests.support.rows import (
    ALPACA,
    ALPACA_TURNS,
    SHAREGPT,
    SHAREGPT_TURNS,
    read,
    turns,
    write,
)


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
