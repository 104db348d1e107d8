"""Files of rows, and the names that lead to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minilora.data.datasets import Tally
from tests.support.rows import ALPACA, ALPACA_TURNS, problems_of, read, turns, write


def test_plain_text_has_a_document_per_line(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes("\ufefffirst \u2028 line\r\n\n  \n third\x0c\n".encode())
    found, tally = read([path], tmp_path, stage="pt")
    assert tally == Tally(2, {})
    assert turns(found) == [[("text", "first \u2028 line")], [("text", " third\x0c")]]
    assert [row.source for row in found] == [f"{path}:1", f"{path}:4"]
    (problem,) = problems_of([path], tmp_path)
    assert "stage: pt" in problem and "book.txt" in problem


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


def test_all_broken_files_are_named_at_once_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('[\n {"instruction": "a"},\n {"instruction" "b"}\n]')
    (tmp_path / "lines.jsonl").write_text('{"text": 1}\n{"text"\n\n{]\n')
    (tmp_path / "many.jsonl").write_text("{\n" * 9)
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo\ncaf\xe9\n")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    (tmp_path / "deep.jsonl").write_text('{"a":' * 200_000)
    names = ["list.json", "lines.jsonl", "many.jsonl", "latin.txt", "empty.json"]
    names += ["deep.json", "deep.jsonl"]
    found = problems_of(names, tmp_path, "pt")
    assert [problem.removeprefix(f"{tmp_path}/").split(": ")[0] for problem in found] == [
        "list.json:3",
        "lines.jsonl:2",
        "lines.jsonl:4",
        *(f"many.jsonl:{number}" for number in range(1, 6)),
        "many.jsonl",
        "latin.txt:3",
        "empty.json",
        "deep.json",
        "deep.jsonl:1",
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
            "columns": {"prompt": "a", "chosen": "i"},
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
        f"{where} pairs: not supported: ranking; remove it from the entry",
        f"{where} pairs: columns not supported: chosen; remove it from the entry",
        f"{where} pairs: tags not supported: user; remove it from the entry",
        f"{where} pairs: num_samples must be a whole number above 0, not 0",
        f"{where} pairs: no such file: {tmp_path / 'none.json'}",
        "dataset no.jsonl: no such file: no.jsonl",
        "dataset no.parquet: cannot read no.parquet; convert it to .json, .jsonl or .txt",
    ]


@pytest.mark.parametrize(
    ("text", "problem"), [("{\n,", ":2: not JSON: "), ("[]", ": a JSON object is needed")]
)
def test_a_broken_dataset_info_is_named(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(text)
    (found,) = problems_of(["mine"], tmp_path)
    assert found.startswith(f"{tmp_path / 'dataset_info.json'}{problem}")
