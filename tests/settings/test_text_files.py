"""Text and JSON files: what is wrong with one is said with its name and line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minilora.settings.errors import RequestError
from minilora.settings.text_files import parse_json, read_json, read_text


def problem_of(path: Path) -> str:
    with pytest.raises(RequestError) as caught:
        read_json(path)
    (problem,) = caught.value.problems
    return problem.replace(str(path), "@")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin.json").write_bytes(b'{\n"caf\xe9": 1}')
    assert problem_of(tmp_path / "missing") == "@: no such file or directory"
    assert problem_of(tmp_path / "pipe") == "@: not a plain file"
    assert problem_of(tmp_path) == "@: not a plain file"
    assert problem_of(tmp_path / "latin.json") == "@:2: not UTF-8; save the file as UTF-8"
    assert problem_of(tmp_path / ("long" * 99)) == "@: file name too long"
    assert problem_of(tmp_path / "a\0b") == "@: embedded null byte"


def test_broken_json_is_said_in_one_way(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    for text, message in {
        "{\n,": "@:2: not JSON: Expecting property name enclosed in double quotes; "
        "correct that line",
        "[" * 200_000: "@: not JSON that can be read: nested too deeply",
        "[]": "@: a JSON object is needed, not list",
    }.items():
        path.write_text(text, encoding="utf-8")
        assert problem_of(path) == message
    path.write_text('{"a": ' + "9" * 5000 + "}", encoding="utf-8")
    assert problem_of(path).startswith("@: not JSON that can be read: Exceeds the limit")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "mark.json"
    path.write_text('\ufeff{"a": 1}', encoding="utf-8")
    assert read_text(path) == '{"a": 1}'
    assert read_json(path) == {"a": 1}


def test_options_go_to_json() -> None:
    assert parse_json("text", "[1, 2.5]", parse_int=str, parse_float=str) == ["1", "2.5"]
