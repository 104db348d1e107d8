"""Where rows come from: names in dataset_info.json, and .json, .jsonl and .txt files."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilora.settings.errors import RequestError
from minilora.settings.text_files import parse_json, read_json, read_text

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
OPENAI_TAGS = SHAREGPT_TAGS | {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
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
    info_path = folder / "dataset_info.json"
    info = read_json(info_path) if info_path.is_file() else {}
    sources: list[Source] = []
    problems: list[str] = []
    for name in names:
        try:
            sources.append(_find(name, info, info_path))
        except RequestError as error:
            problems += error.problems
        except OSError as error:  # a name that no file can have
            problems.append(f"dataset {name[:80]}: {str(error.strerror).lower()}")
    if problems:
        raise RequestError(problems)
    return sources


def _find(name: str, info: Mapping[str, Any], info_path: Path) -> Source:
    if name in info:
        return _from_entry(name, info[name], info_path)
    if Path(name).suffix == "" and not Path(name).exists():
        close = difflib.get_close_matches(name, list(info), 1)
        known = f"; it has {', '.join(list(info)[:20])}" if info else ""
        hint = f"; did you mean {close[0]}?" if close else known
        raise RequestError([f"dataset: {name} is neither in {info_path} nor a file{hint}"])
    beside = info_path.parent / name
    path = beside if beside.is_file() and not Path(name).is_file() else Path(name)
    if problem := _file_problem(path):
        raise RequestError([f"dataset {name}: {problem}"])
    return Source(path)


def _file_problem(path: Path) -> str:
    if path.suffix not in (".json", ".jsonl", ".txt"):
        return f"cannot read {path}; convert it to .json, .jsonl or .txt"
    return "" if path.is_file() else f"no such file: {path}"


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
        problems.append(f"not supported: {', '.join(unknown)}; remove it from the entry")
    columns, tags = entry.get("columns", {}), entry.get("tags", {})
    for key, table, allowed in (
        ("columns", columns, {"prompt", "response", "messages", *OPTIONAL_COLUMNS}),
        ("tags", tags, set(SHAREGPT_TAGS)),
    ):
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            problems.append(f"{key} must map names to names")
        elif set(table) - allowed:
            unknown = sorted(set(table) - allowed)
            problems.append(f"{key} not supported: {', '.join(unknown)}; remove it from the entry")
    if samples is not None and (type(samples) is not int or samples < 1):
        problems.append(f"num_samples must be a whole number above 0, not {samples!r}")
    path = info_path.parent / entry["file_name"]
    if problem := _file_problem(path):
        problems.append(problem)
    if problems:
        raise RequestError([f"{where}: {problem}" for problem in problems])
    return Source(path, formatting, columns, tags, samples)


def read_rows(path: Path) -> list[Row]:
    """All rows of a .json (a list, or an object per line), .jsonl or .txt file, but no blank lines.

    Raises RequestError naming the lines that are not UTF-8 or not JSON.
    """
    text = read_text(path)
    if path.suffix != ".txt" and text.lstrip()[:1] == "[":
        values = parse_json(path, text)
        return [Row(f"{path} row {number}", value) for number, value in enumerate(values, start=1)]
    rows, problems = [], []
    # Lines as editors count them: str.splitlines would also cut at U+2028 and form feeds.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            line = line.removesuffix("\r")
            value = {"text": line} if path.suffix == ".txt" else json.loads(line)
            rows.append(Row(f"{path}:{number}", value))
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            problems.append(
                f"{path}:{number}: not JSON: {reason}; a row per line, or a list of rows, is read"
            )
    if len(problems) > MOST_BROKEN_LINES:
        more = f"{path}: {len(problems) - MOST_BROKEN_LINES} more lines are broken"
        problems = [*problems[:MOST_BROKEN_LINES], more]
    if problems:
        raise RequestError(problems)
    return rows
