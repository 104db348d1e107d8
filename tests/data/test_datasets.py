"""Which rows and columns of a dataset are read, and what is counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minilora.data.conversations import Turn
from minilora.data.datasets import Tally
from minilora.settings.errors import RequestError
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


def entry(folder: Path, rows: Sequence[Any], **entry: Any) -> list[Pairs]:
    write(folder / "data.json", rows)
    info = {"mine": {"file_name": "data.json", **entry}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return turns(read(["mine"], folder)[0])


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


def test_missing_columns_name_what_is_there(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", [{"question": "q", "answer": "a"}])
    (problem,) = problems_of([path], tmp_path)
    assert f"{path}: has the columns answer, question; expected messages, or" in problem
    with pytest.raises(RequestError, match="no column instruction, output among answer, question"):
        entry(tmp_path, [{"question": "q", "answer": "a"}])
    columns = {"prompt": "question", "response": "answer", "system": "sys"}
    with pytest.raises(RequestError, match="no column sys among"):
        entry(tmp_path, [{"question": "q", "answer": "a"}], columns=columns)


def test_entries_of_dataset_info_are_read_as_llama_factory_does(tmp_path: Path) -> None:
    row = {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["1", "2"]]}
    question = [("user", "a\nb"), ("assistant", "c")]
    assert entry(tmp_path, [row]) == [question]  # optional columns only if they are named
    names = {"prompt": "instruction", "response": "output"}
    assert entry(tmp_path, [row], columns=names) == [[("user", "a"), ("assistant", "c")]]
    names |= {"query": "input", "system": "system", "history": "history"}
    assert entry(tmp_path, [row], columns=names) == [
        [("system", "s"), ("user", "1"), ("assistant", "2"), *question]
    ]
    swapped = {"prompt": "output", "response": "instruction"}
    assert entry(tmp_path, [row], columns=swapped) == [[("user", "c"), ("assistant", "a")]]


def test_entries_rename_messages_and_tags(tmp_path: Path) -> None:
    row = {
        "chat": [
            {"who": "boss", "says": "q"},
            {"who": "bot", "says": "a"},
            {"who": "observation", "says": "r"},  # tags that are left out keep their defaults
            {"who": "bot", "says": "b"},
        ]
    }
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "boss", "assistant_tag": "bot"}
    expected = [("user", "q"), ("assistant", "a"), ("tool", "r"), ("assistant", "b")]
    columns = {"messages": "chat"}
    found = entry(tmp_path, [row], formatting="sharegpt", columns=columns, tags=tags)
    assert found == [expected]
    assert entry(tmp_path, OPENAI, formatting="openai") == OPENAI_TURNS
    assert entry(tmp_path, SHAREGPT[:1], formatting="sharegpt") == SHAREGPT_TURNS[:1]


def test_num_samples_is_a_fixed_sample_and_max_samples_the_first_rows(tmp_path: Path) -> None:
    rows = [{"instruction": str(i), "output": "x"} for i in range(20)]
    names = [row["instruction"] for row in rows]
    some = [pairs[0][1] for pairs in entry(tmp_path, rows, num_samples=5)]
    assert len(set(some)) == 5 and some != names[:5]
    assert [pairs[0][1] for pairs in entry(tmp_path, rows, num_samples=5)] == some
    many = [pairs[0][1] for pairs in entry(tmp_path, rows, num_samples=50)]
    assert many[:5] == some
    assert sorted(many[:20]) == sorted(many[20:40]) == sorted(names)
    assert len(many) == 50
    found, tally = read(["mine", "data.json"], tmp_path, max_samples=3)
    assert [row.turns[0].text for row in found] == many[:3] + names[:3]
    assert tally.kept == 6


def test_pt_reads_the_text_column_or_the_one_named_prompt(tmp_path: Path) -> None:
    rows = [{"text": "t", "body": "b"}, {"text": "", "body": "c"}]
    path = write(tmp_path / "data.json", rows)
    found, tally = read([path], tmp_path, stage="pt")
    assert turns(found) == [[("text", "t")]]
    assert tally.dropped == {"empty text": (f"{path} row 2",)}
    info = {"mine": {"file_name": "data.json", "columns": {"prompt": "body"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert turns(read(["mine"], tmp_path, stage="pt")[0]) == [[("text", "b")], [("text", "c")]]
    (problem,) = problems_of([path], tmp_path)
    assert "body, text" in problem and "text alone is for stage: pt" in problem
    (problem,) = problems_of([write(tmp_path / "a.json", ALPACA)], tmp_path, "pt")
    assert "no column text among" in problem


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


def test_an_entry_may_name_what_no_row_has(tmp_path: Path) -> None:
    """LLaMA-Factory's data/README names tools, images and the split of every dataset."""
    row = {"conversations": SHAREGPT[0]["conversations"], "tools": "[]", "images": [], "sys": ""}
    named = {"messages": "conversations", "tools": "tools", "images": "images", "system": "sys"}
    nothing = {"split": "train", "subset": None, "ranking": False, "tags": None}
    columns = {**named, "videos": "videos", "history": "", "query": None}
    found = entry(tmp_path, [row], formatting="sharegpt", columns=columns, **nothing)
    assert found == SHAREGPT_TURNS[:1]
    with pytest.raises(RequestError, match="not supported: split; remove it from the entry"):
        entry(tmp_path, [row], formatting="sharegpt", columns=named, split="test")


@pytest.mark.parametrize("key", ["tools", "images", "videos", "audios"])
def test_a_row_with_tools_or_media_is_refused_by_name(key: str, tmp_path: Path) -> None:
    row = {**SHAREGPT[0], key: ["x"]}
    words = f"rows have {key}, which would be left out of the prompt"
    (problem,) = problems_of([write(tmp_path / "bare.json", [row])], tmp_path)
    assert words in problem
    renamed = {**SHAREGPT[0], "mine": ["x"]}
    columns = {"messages": "conversations", key: "mine"}
    with pytest.raises(RequestError, match=words):
        entry(tmp_path, [renamed], formatting="sharegpt", columns=columns)
