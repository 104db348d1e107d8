"""Where rows come from: names in dataset_info.json, and .json, .jsonl and .txt files."""

from __future__ import annotations

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

# The names that columns have by default, by LLaMA-Factory's keys for them.
REQUIRED_COLUMNS = {
    "alpaca": {"prompt": "instruction", "response": "output"},
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "messages"},
    "text": {"prompt": "text"},
}
OPTIONAL_COLUMNS = {"query": "input", "history": "history", "system": "system"}

# What an entry of dataset_info.json may have. file_sha1 is for LLaMA-Factory's downloads alone.
ENTRY_KEYS = {"file_name", "formatting", "columns", "tags", "num_samples", "file_sha1"}
FORMATTINGS = ("alpaca", "sharegpt", "openai")
COLUMN_KEYS = {"prompt", "response", "messages", *OPTIONAL_COLUMNS}
SUFFIXES = (".json", ".jsonl", ".txt")

MOST_BROKEN_LINES = 5  # of one file that are reported one by one
MOST_NAMES = 20  # of dataset_info.json that an error lists


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
    """The file behind one name. Raises RequestError or OSError."""
    if name in info:
        return _from_entry(name, info[name], info_path)
    if Path(name).suffix == "" and not Path(name).exists():
        raise RequestError([_unknown_name(name, list(info), info_path)])

    # A path is taken as it is, or else as one relative to dataset_dir.
    path = Path(name)
    in_folder = info_path.parent / name
    if in_folder.is_file() and not path.is_file():
        path = in_folder
    if problem := _file_problem(path):
        raise RequestError([f"dataset {name}: {problem}"])
    return Source(path)


def _unknown_name(name: str, known: list[str], info_path: Path) -> str:
    """What to tell about a name without an entry, with the name that was perhaps meant."""
    problem = f"dataset: {name} is neither in {info_path} nor a file"
    close = difflib.get_close_matches(name, known, 1)
    if close:
        return f"{problem}; did you mean {close[0]}?"
    if known:
        return f"{problem}; it has {', '.join(known[:MOST_NAMES])}"
    return problem


def _file_problem(path: Path) -> str:
    """Why a file cannot hold rows; an empty text if it can."""
    if path.suffix not in SUFFIXES:
        return f"cannot read {path}; convert it to .json, .jsonl or .txt"
    if not path.is_file():
        return f"no such file: {path}"
    return ""


def _from_entry(name: str, entry: Any, info_path: Path) -> Source:
    """A source from an entry of dataset_info.json. Raises RequestError with all its problems."""
    where = f"{info_path}: dataset {name}"
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise RequestError([f"{where}: needs a file_name; datasets of hubs are not downloaded"])
    path = info_path.parent / entry["file_name"]
    if problems := _entry_problems(entry, path):
        raise RequestError([f"{where}: {problem}" for problem in problems])
    return Source(
        path,
        entry.get("formatting", "alpaca"),
        entry.get("columns", {}),
        entry.get("tags", {}),
        entry.get("num_samples"),
    )


def _entry_problems(entry: Mapping[str, Any], path: Path) -> list[str]:
    """What is wrong with an entry of dataset_info.json whose rows are in the file `path`."""
    problems = []
    formatting = entry.get("formatting", "alpaca")
    if formatting not in FORMATTINGS:
        problems.append(f"formatting {formatting!r} is not one of {', '.join(FORMATTINGS)}")

    # A key that is false or empty asks for nothing.
    if unknown := [key for key in entry if key not in ENTRY_KEYS and entry[key]]:
        problems.append(f"not supported: {', '.join(unknown)}; remove it from the entry")
    problems += _table_problems("columns", entry.get("columns", {}), COLUMN_KEYS)
    problems += _table_problems("tags", entry.get("tags", {}), set(SHAREGPT_TAGS))

    samples = entry.get("num_samples")
    if samples is not None and (type(samples) is not int or samples < 1):
        problems.append(f"num_samples must be a whole number above 0, not {samples!r}")
    if problem := _file_problem(path):
        problems.append(problem)
    return problems


def _table_problems(key: str, table: Any, allowed: set[str]) -> list[str]:
    """What is wrong with the columns or the tags of an entry."""
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        return [f"{key} must be an object whose values are names"]
    if unknown := sorted(set(table) - allowed):
        return [f"{key} not supported: {', '.join(unknown)}; remove it from the entry"]
    return []


def read_rows(path: Path) -> list[Row]:
    """All rows of a .json, .jsonl or .txt file, without its blank lines.

    A .json and a .jsonl file may hold one list of rows, or a row per line.
    Raises RequestError naming the lines that are not UTF-8 or not JSON.
    """
    text = read_text(path)
    if path.suffix != ".txt" and text.lstrip()[:1] == "[":
        values = parse_json(path, text)
        return [Row(f"{path} row {number}", value) for number, value in enumerate(values, start=1)]

    rows: list[Row] = []
    problems: list[str] = []
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
                f"{path}:{number}: not JSON: {reason}; a file has one row per line, or one list "
                "of rows"
            )

    if len(problems) > MOST_BROKEN_LINES:
        more = len(problems) - MOST_BROKEN_LINES
        problems = [*problems[:MOST_BROKEN_LINES], f"{path}: {more} more lines are broken"]
    if problems:
        raise RequestError(problems)
    return rows
