"""Files to conversations, good ones and bad ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minilora.config import DataSettings, RequestError
from minilora.data.records import Conversation, Tally, Turn, read_conversations

Pairs = list[tuple[str, str]]


def write(path: Path, rows: Sequence[Any]) -> Path:
    """A file of these rows: .jsonl a row per line, .json a list."""
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = json.dumps(rows, indent=1)
    path.write_text(text, encoding="utf-8")
    return path


def read(
    names: Sequence[Path | str], folder: Path, stage: str = "sft", **fields: Any
) -> tuple[list[Conversation], Tally]:
    data = DataSettings(dataset_dir=str(folder), **fields)
    return read_conversations([str(name) for name in names], data, stage)


def turns(conversations: Sequence[Conversation]) -> list[Pairs]:
    return [[(turn.role, turn.text) for turn in row.turns] for row in conversations]


def problems_of(names: Sequence[Path | str], folder: Path, stage: str = "sft") -> list[str]:
    with pytest.raises(RequestError) as caught:
        read(names, folder, stage)
    return list(caught.value.problems)


ALPACA = [
    {"instruction": "add", "input": "1 2", "output": "3"},
    {"instruction": "hi", "input": "", "output": "hello", "system": "S"},
    {"instruction": "c", "output": "d", "history": [["a", "b"], ["x", "y"]]},
    {"instruction": None, "input": "only", "output": ""},
]
ALPACA_TURNS: list[Pairs] = [
    [("user", "add\n1 2"), ("assistant", "3")],
    [("system", "S"), ("user", "hi"), ("assistant", "hello")],
    [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "x"),
        ("assistant", "y"),
        ("user", "c"),
        ("assistant", "d"),
    ],
    [("user", "only"), ("assistant", "")],
]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {
        "system": "column",
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "a"},
        ],
    },
    {
        "system": "column",
        "conversations": [
            {"from": "system", "value": "message"},
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
        ],
    },
]
CALL = '[{"name": "f", "arguments": {"x": 1}}]'
SHAREGPT_TURNS: list[Pairs] = [
    [("user", "q"), ("assistant", "a")],
    [("system", "column"), ("user", "q"), ("call", CALL), ("tool", "r"), ("assistant", "a")],
    [("system", "message"), ("user", "q"), ("assistant", "a")],
]
OPENAI = [
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "1",
                        "type": "function",
                        "function": {"name": "f", "arguments": '{"x": 1}'},
                    }
                ],
            },
            {"role": "tool", "content": "r", "tool_call_id": "1"},
            {"role": "assistant", "content": "a"},
        ]
    }
]
OPENAI_TURNS: list[Pairs] = [
    [("system", "s"), ("user", "q"), ("call", CALL), ("tool", "r"), ("assistant", "a")]
]


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


def entry(folder: Path, rows: Sequence[Any], **entry: Any) -> list[Pairs]:
    write(folder / "data.json", rows)
    info = {"mine": {"file_name": "data.json", **entry}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return turns(read(["mine"], folder)[0])


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


def test_plain_text_has_a_document_per_line(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes("\ufefffirst \u2028 line\r\n\n  \n third\x0c\n".encode())
    found, _ = read([path], tmp_path, stage="pt")
    assert turns(found) == [[("text", "first \u2028 line")], [("text", " third\x0c")]]
    assert [row.source for row in found] == [f"{path}:1", f"{path}:4"]
    (problem,) = problems_of([path], tmp_path)
    assert "stage: pt" in problem and "book.txt" in problem


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


def test_json_files_may_hold_an_object_per_line_and_jsonl_a_list(tmp_path: Path) -> None:
    for name in ("a.json", "b.jsonl"):
        lines = write(tmp_path / "lines.jsonl", ALPACA[:2]).read_text()
        (tmp_path / name).write_text(lines.replace("\n", "\r\n\r\n"))
        found, _ = read([tmp_path / name], tmp_path)
        assert turns(found) == ALPACA_TURNS[:2]
        assert found[1].source == f"{tmp_path / name}:3"
    text = write(tmp_path / "list.json", ALPACA[:2]).read_text()
    (tmp_path / "c.jsonl").write_text(text)
    assert turns(read([tmp_path / "c.jsonl"], tmp_path)[0]) == ALPACA_TURNS[:2]


def say(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in pairs]}


BAD_MESSAGES = [
    (say(("gpt", "a"), ("human", "q")), "questions and answers do not alternate"),
    (say(("human", "q"), ("human", "q")), "questions and answers do not alternate"),
    (
        say(("human", "q"), ("system", "s"), ("human", "q"), ("gpt", "a")),
        "questions and answers do not alternate",
    ),
    (say(("human", "q"), ("gpt", "a"), ("human", "q")), "no answer at the end"),
    (say(("system", "s")), "no answer at the end"),
    (say(), "no answer at the end"),
    (
        say(("user", "q"), ("gpt", "a")),
        "role 'user' is none of human, gpt, observation, function_call, system",
    ),
    (say(("human", 3), ("gpt", "a")), "a value is not text"),
    (say(("human", "\ud800"), ("gpt", "a")), "a text has half of a surrogate pair"),
    (say(("human", None), ("gpt", "a")), "no value"),
    (say(("human", "q"), ("function_call", "f(x)")), "a tool call is not JSON"),
    (
        say(("human", "q"), ("function_call", '{"name": "f"}')),
        "a tool call needs a name and an object of arguments",
    ),
    (
        say(("human", "q"), ("function_call", "[3]")),
        "a tool call needs a name and an object of arguments",
    ),
    ({"conversations": "q"}, "messages are not a list of objects"),
    ({"conversations": ["q"]}, "messages are not a list of objects"),
    ({"conversations": None}, "no conversations"),
    ({}, "no conversations"),
    (["q"], "not an object with columns"),
    (None, "not an object with columns"),
]


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


def test_all_broken_files_are_named_at_once_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('[\n {"instruction": "a"},\n {"instruction" "b"}\n]')
    (tmp_path / "lines.jsonl").write_text('{"text": 1}\n{"text"\n\n{]\n')
    (tmp_path / "many.jsonl").write_text("{\n" * 9)
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo\ncaf\xe9\n")
    (tmp_path / "empty.json").write_text("[]")
    names = ["list.json", "lines.jsonl", "many.jsonl", "latin.txt", "empty.json"]
    found = problems_of(names, tmp_path, "pt")
    assert [problem.removeprefix(f"{tmp_path}/").split(": ")[0] for problem in found] == [
        "list.json:3",
        "lines.jsonl:2",
        "lines.jsonl:4",
        *(f"many.jsonl:{number}" for number in range(1, 6)),
        "many.jsonl",
        "latin.txt:3",
        "empty.json",
    ]
    assert "4 more lines" in found[8]
    assert "not UTF-8" in found[9]
    assert "no rows" in found[10]


def test_all_unusable_names_are_reported_at_once(tmp_path: Path) -> None:
    info: dict[str, Any] = {
        "alpaca_demo": {"file_name": "none.json"},
        "hub": {"hf_hub_url": "a/b"},
        "old": {"file_name": "old.csv"},
        "pairs": {
            "file_name": "none.json",
            "ranking": True,
            "formatting": "chatml",
            "num_samples": 0,
            "columns": {"prompt": "a", "images": "i"},
            "tags": {"user": "u"},
        },
    }
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps(info))
    found = problems_of(
        ["alpaca_dem", "zzz", "alpaca_demo", "hub", "old", "pairs", "no.jsonl", "no.parquet"],
        tmp_path,
    )
    where = f"{path}: dataset"
    assert found == [
        f"dataset: alpaca_dem is neither in {path} nor a file; did you mean alpaca_demo?",
        f"dataset: zzz is neither in {path} nor a file; it has alpaca_demo, hub, old, pairs",
        f"{where} alpaca_demo: no such file: {tmp_path / 'none.json'}",
        f"{where} hub: needs a file_name; datasets of hubs are not downloaded",
        f"{where} old: cannot read {tmp_path / 'old.csv'}; convert it to .json, .jsonl or .txt",
        f"{where} pairs: formatting 'chatml' is not one of alpaca, sharegpt, openai",
        f"{where} pairs: not supported: ranking",
        f"{where} pairs: columns not supported: images",
        f"{where} pairs: tags not supported: user",
        f"{where} pairs: num_samples must be a whole number above 0, not 0",
        f"{where} pairs: no such file: {tmp_path / 'none.json'}",
        "dataset no.jsonl: no such file: no.jsonl",
        "dataset no.parquet: cannot read no.parquet; convert it to .json, .jsonl or .txt",
    ]


@pytest.mark.parametrize(
    ("text", "problem"), [("{\n,", ":2: not valid JSON: "), ("[]", ": expected an object")]
)
def test_a_broken_dataset_info_is_named(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(text)
    (found,) = problems_of(["mine"], tmp_path)
    assert found.startswith(f"{tmp_path / 'dataset_info.json'}{problem}")


def test_missing_columns_name_what_is_there(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", [{"question": "q", "answer": "a"}])
    (problem,) = problems_of([path], tmp_path)
    assert f"{path}: has the columns answer, question; expected messages, or" in problem
    with pytest.raises(RequestError, match="no column instruction, output among answer, question"):
        entry(tmp_path, [{"question": "q", "answer": "a"}])
    columns = {"prompt": "question", "response": "answer", "system": "sys"}
    with pytest.raises(RequestError, match="no column sys among"):
        entry(tmp_path, [{"question": "q", "answer": "a"}], columns=columns)


def test_datasets_keep_their_order(tmp_path: Path) -> None:
    one = write(tmp_path / "one.json", ALPACA[:1])
    two = write(tmp_path / "two.json", ALPACA[1:2])
    found, _ = read([two, one, two], tmp_path)
    assert turns(found) == [ALPACA_TURNS[1], ALPACA_TURNS[0], ALPACA_TURNS[1]]
    assert found[0].turns[0] == Turn("system", "S")
