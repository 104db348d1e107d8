"""One row to a conversation; why a row cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minilora.data.datasets import Tally
from tests.support.bad_rows import BAD_MESSAGES, say
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


def talk(*messages: dict[str, Any]) -> dict[str, Any]:
    """A row of OpenAI messages: a question, and then these."""
    return {"messages": [{"role": "user", "content": "q"}, *messages]}


def answer(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


TEXT = {"type": "text", "text": "a"}
CALL = {"name": "f", "arguments": {"x": 1}}
TOOL_CALL = {"id": "1", "type": "function", "function": CALL}


def test_an_answer_of_weight_0_is_not_to_be_learned(tmp_path: Path) -> None:
    weights = [None, 1, 0, 0.0, 1.0]
    rows = [talk(answer("a", weight=weight)) for weight in weights]
    shared = [say(("human", "q"), ("gpt", "a"))]
    shared[0]["conversations"][1]["weight"] = 0
    found, _ = read([write(tmp_path / "data.jsonl", rows)], tmp_path)
    assert [row.turns[-1].trained for row in found] == [True, True, False, False, True]
    found, _ = read([write(tmp_path / "shared.jsonl", shared)], tmp_path)
    assert found[0].turns[-1].trained is False


def test_content_in_parts_of_text_is_joined(tmp_path: Path) -> None:
    parts = [TEXT, {"type": "text", "text": "\nb"}]
    row = {"messages": [{"role": "user", "content": [TEXT]}, answer(parts)]}
    found, _ = read([write(tmp_path / "data.jsonl", [row])], tmp_path)
    assert turns(found) == [[("user", "a"), ("assistant", "a\nb")]]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([answer([TEXT, {"type": "image_url", "image_url": {"url": "x"}}])],
         "content of type image_url cannot be read, only text"),
        ([answer(["a"])], "content of type str cannot be read, only text"),
        ([answer([{"type": "text"}])], "no text"),
        ([answer("a", weight=0.5)], "weight is neither 0 nor 1"),
        ([answer("a", weight=True)], "weight is neither 0 nor 1"),
        ([answer("a", weight="0")], "weight is neither 0 nor 1"),
        ([answer("a", reasoning_content="so")],
         "a message has reasoning_content, which is not read; write it into the content"),
        ([answer(None, tool_calls=[TOOL_CALL]), {"role": "tool", "content": "r"}],
         "no answer at the end"),
    ],
)  # fmt: skip
def test_what_a_message_must_not_hold(messages: Any, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [talk(answer("a")), talk(*messages)])
    _, tally = read([path], tmp_path)
    assert tally == Tally(1, {reason: (f"{path}:2",)})


def test_results_of_parallel_calls_follow_each_other(tmp_path: Path) -> None:
    results = [{"role": "tool", "content": text, "tool_call_id": text} for text in "rs"]
    calls = answer("Let me look.", tool_calls=[TOOL_CALL, TOOL_CALL])
    row = talk(calls, *results, answer("a"))
    found, _ = read([write(tmp_path / "data.jsonl", [row])], tmp_path)
    assert [turn.role for turn in found[0].turns] == ["user", "call", "tool", "tool", "assistant"]
    assert found[0].turns[1].before_calls == "Let me look."
    old = talk(answer(None, function_call={"name": "f", "arguments": '{"x": 1}'}), results[0],
               answer("a"))  # fmt: skip
    found, _ = read([write(tmp_path / "old.jsonl", [old])], tmp_path)
    assert found[0].turns[1].text == '[{"name": "f", "arguments": {"x": 1}}]'


def test_a_thought_before_a_call_is_kept(tmp_path: Path) -> None:
    """As LLaMA-Factory's FunctionFormatter, which takes it off before it reads the JSON text."""
    call = '<think>\nlook first\n</think>\n\n{"name": "f", "arguments": {"x": 1}}'
    row = say(("human", "q"), ("function_call", call), ("observation", "r"), ("gpt", "a"))
    found, _ = read([write(tmp_path / "data.jsonl", [row])], tmp_path)
    assert found[0].turns[1].before_calls == "<think>\nlook first\n</think>\n\n"
    assert found[0].turns[1].text == '[{"name": "f", "arguments": {"x": 1}}]'
