"""Where rows come from: names in dataset_info.json, and .json, .jsonl and .txt files."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilora.config import RequestError

# LLaMA-Factory's defaults (data/parser.py), and those of OpenAI's fine-tuning files.
SHAREGPT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
REQUIRED_COLUMNS = {
    "alpaca": {"prompt": "instruction", "response": "output"},
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "messages"},
    "text": {"prompt": "text"},
}
OPTIONAL_COLUMNS = {"query": "input", "history": "history", "system": "system"}
MOST_BROKEN_LINES = 5  # of one file that are reported one by one


@dataclass(frozen=True)
class Source:
    """One dataset: a file and how to read its rows.

    formatting: None to tell it from the columns. columns, tags: what differs from the defaults.
    """

    path: Path
    formatting: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    num_samples: int | None = None


@dataclass(frozen=True)
class Row:
    """One row of a file. place: "data.jsonl:12" is a line, "data.json row 12" a list entry."""

    place: str
    value: Any


def find_sources(names: tuple[str, ...], folder: Path) -> list[Source]:
    """The files behind names from folder/dataset_info.json and paths.

    Raises RequestError with every name, entry or file that cannot be used.
    """
    sources: list[Source] = []
    problems: list[str] = []
    info_path = folder / "dataset_info.json"
    info: Mapping[str, Any] = {}
    try:
        if info_path.is_file():
            info = _json_object(info_path)
        for name in names:
            try:
                sources.append(_find(name, info, info_path))
            except RequestError as error:
                problems += error.problems
    except RequestError as error:
        problems += error.problems
    if problems:
        raise RequestError(problems)
    return sources


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise RequestError([f"{path}:{error.lineno}: not valid JSON: {error.msg}"]) from None
    if not isinstance(value, dict):
        raise RequestError([f"{path}: expected an object of datasets by name"])
    return value


def _find(name: str, info: Mapping[str, Any], info_path: Path) -> Source:
    if name in info:
        return _from_entry(name, info[name], info_path)
    if Path(name).suffix == "" and not Path(name).exists():
        close = difflib.get_close_matches(name, list(info), 1)
        known = f"; it has {', '.join(list(info)[:20])}" if info else ""
        hint = f"; did you mean {close[0]}?" if close else known
        raise RequestError([f"dataset: {name} is neither in {info_path} nor a file{hint}"])
    path = Path(name) if Path(name).is_file() else info_path.parent / name
    if problems := _file_problems(path if path.is_file() else Path(name)):
        raise RequestError([f"dataset {name}: {problem}" for problem in problems])
    return Source(path)


def _file_problems(path: Path) -> list[str]:
    if path.suffix not in (".json", ".jsonl", ".txt"):
        return [f"cannot read {path}; convert it to .json, .jsonl or .txt"]
    return [] if path.is_file() else [f"no such file: {path}"]


def _from_entry(name: str, entry: Any, info_path: Path) -> Source:
    """A source from an entry of dataset_info.json."""
    where = f"{info_path}: dataset {name}"
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise RequestError([f"{where}: needs a file_name; datasets of hubs are not downloaded"])
    formatting, samples = entry.get("formatting", "alpaca"), entry.get("num_samples")
    problems = []
    if formatting not in ("alpaca", "sharegpt", "openai"):
        problems.append(f"formatting {formatting!r} is not one of alpaca, sharegpt, openai")
    known = {"file_name", "formatting", "columns", "tags", "num_samples", "file_sha1"}
    if unknown := [key for key in entry if key not in known and entry[key]]:
        problems.append(f"not supported: {', '.join(unknown)}")
    columns, tags = entry.get("columns", {}), entry.get("tags", {})
    for key, table, allowed in (
        ("columns", columns, {"prompt", "response", "messages", *OPTIONAL_COLUMNS}),
        ("tags", tags, set(SHAREGPT_TAGS)),
    ):
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            problems.append(f"{key} must map names to names")
        elif set(table) - allowed:
            problems.append(f"{key} not supported: {', '.join(sorted(set(table) - allowed))}")
    if samples is not None and (type(samples) is not int or samples < 1):
        problems.append(f"num_samples must be a whole number above 0, not {samples!r}")
    path = info_path.parent / entry["file_name"]
    problems += _file_problems(path)
    if problems:
        raise RequestError([f"{where}: {problem}" for problem in problems])
    return Source(path, formatting, columns, tags, samples)


def read_rows(path: Path) -> list[Row]:
    """All rows of a .json (a list, or an object per line), .jsonl or .txt file, but no blank lines.

    Raises RequestError naming the lines that are not UTF-8 or not JSON.
    """
    text = _read_text(path)
    if path.suffix == ".txt":
        return [
            Row(f"{path}:{number}", {"text": line})
            for number, line in enumerate(_lines(text), start=1)
            if line.strip()
        ]
    if text.lstrip()[:1] == "[":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise RequestError([f"{path}:{error.lineno}: not valid JSON: {error.msg}"]) from None
        return [Row(f"{path} row {number}", value) for number, value in enumerate(rows, start=1)]
    return _read_json_lines(path, text)


def _read_json_lines(path: Path, text: str) -> list[Row]:
    rows, problems = [], []
    for number, line in enumerate(_lines(text), start=1):
        if line.strip():
            try:
                rows.append(Row(f"{path}:{number}", json.loads(line)))
            except json.JSONDecodeError as error:
                problems.append(f"{path}:{number}: not a JSON object on one line: {error.msg}")
    if len(problems) > MOST_BROKEN_LINES:
        more = f"{path}: {len(problems) - MOST_BROKEN_LINES} more lines are broken"
        problems = [*problems[:MOST_BROKEN_LINES], more]
    if problems:
        raise RequestError(problems)
    return rows


def _lines(text: str) -> list[str]:
    """Lines as editors count them: str.splitlines would also cut at U+2028 and form feeds."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RequestError([f"{path}:{line}: not UTF-8; save the file as UTF-8"]) from None
