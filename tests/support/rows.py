"""Rows in the formats that are read, what becomes of them, and calls to read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minilora.data.conversations import Conversation
from minilora.data.datasets import Tally, read_conversations
from minilora.settings.errors import RequestError
from minilora.settings.settings import DataSettings

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
    """The conversations of these datasets; fields: of the data's settings."""
    data = DataSettings(dataset_dir=str(folder), **fields)
    return read_conversations([str(name) for name in names], data, stage)


def turns(conversations: Sequence[Conversation]) -> list[Pairs]:
    """Of each conversation its turns as (role, text)."""
    return [[(turn.role, turn.text) for turn in row.turns] for row in conversations]


def problems_of(names: Sequence[Path | str], folder: Path, stage: str = "sft") -> list[str]:
    """Why these datasets are refused."""
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
