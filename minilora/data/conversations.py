"""One row of an alpaca, sharegpt, OpenAI-messages or plain-text file as a conversation.

The meaning of every column follows LLaMA-Factory (data/converter.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The role of `Turn` behind each of LLaMA-Factory's tags, in the order in which messages list them.
ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "call",
    "system_tag": "system",
}
QUESTIONS = ("user", "tool")
ANSWERS = ("assistant", "call")


@dataclass(frozen=True)
class Turn:
    """One message.

    role: system, user, assistant, tool (the result of a call), call (of tools, by the assistant),
    or text for stage pt. The text of a call is a JSON list of {"name": ..., "arguments": {...}}.
    """

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """Perhaps a system turn, then questions and answers in turn.

    source: the file and the line or row it comes from.
    """

    turns: tuple[Turn, ...]
    source: str


class BadRow(ValueError):
    """Why a row cannot be used, in words that are the same for all such rows."""


def to_turns(
    row: Any, formatting: str, columns: Mapping[str, str], tags: Mapping[str, str]
) -> tuple[Turn, ...]:
    """The turns of a row.

    formatting: alpaca, sharegpt, openai or text. columns, tags: what the file calls them, by
    LLaMA-Factory's keys. Raises BadRow.
    """
    if formatting == "text":
        text = _text(_field(row, columns["prompt"]))
        if not text.strip():
            raise BadRow("empty text")
        return (Turn("text", text),)
    if formatting == "alpaca":
        return _checked(_from_alpaca(row, columns))
    return _checked(_from_messages(row, columns, tags))


def _from_alpaca(row: Any, columns: Mapping[str, str]) -> list[Turn]:
    """A question of instruction and input, joined by a newline, and the answer.

    Earlier rounds in `history` come before them.
    """
    answer = _text(_field(row, columns["response"]))
    rounds = _history(row, columns)
    parts = [row.get(columns["prompt"]), row.get(columns.get("query", ""))]
    question = "\n".join(_text(part) for part in parts if part)

    turns = _system_turn(row, columns)
    for earlier, reply in [*rounds, [question, answer]]:
        turns += [Turn("user", _text(earlier)), Turn("assistant", _text(reply))]
    return turns


def _history(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[Any]:
    """The pairs [question, answer] of earlier rounds."""
    history = row.get(columns.get("history", "")) or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise BadRow("history is not a list of [question, answer]")
    return history


def _from_messages(row: Any, columns: Mapping[str, str], tags: Mapping[str, str]) -> list[Turn]:
    """A list of messages; a system message among them takes the place of the system column."""
    messages = _field(row, columns["messages"])
    if not isinstance(messages, list) or not all(isinstance(item, dict) for item in messages):
        raise BadRow("messages are not a list of objects")
    turns = [_message(message, tags) for message in messages]
    if turns and turns[0].role == "system":
        return turns
    return [*_system_turn(row, columns), *turns]


def _message(message: Mapping[str, Any], tags: Mapping[str, str]) -> Turn:
    """One message, whatever the file calls its role and its content."""
    roles = {tags[tag]: role for tag, role in ROLES.items()}
    name = message.get(tags["role_tag"])
    if not isinstance(name, str) or name not in roles:
        raise BadRow(f"role {name!r} is none of {', '.join(roles)}")

    # OpenAI's files have calls in a field of their own, LLaMA-Factory's as the text of a role.
    if message.get("tool_calls"):
        return Turn("call", _calls(message["tool_calls"]))
    text = _text(_field(message, tags["content_tag"]))
    if roles[name] != "call":
        return Turn(roles[name], text)
    return Turn("call", _calls(_parsed(text, "a tool call is not JSON")))


def _calls(calls: Any) -> str:
    """Tool calls in the one form of `Turn`, from OpenAI's form and from that of LLaMA-Factory."""
    problem = "a tool call needs a name and an object of arguments"
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        # OpenAI wraps {"name": ..., "arguments": ...} once more, and writes arguments as a string.
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict):
            inner = {}
        name, arguments = inner.get("name"), inner.get("arguments")
        if isinstance(arguments, str):
            arguments = _parsed(arguments, problem)

        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise BadRow(problem)
        result.append({"name": name, "arguments": arguments})
    return _text(json.dumps(result, ensure_ascii=False))


def _parsed(text: str, problem: str) -> Any:
    """The value of a JSON text inside a row. Raises BadRow with this problem."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # also of thousands of digits, or of nested brackets
        raise BadRow(problem) from None


def _system_turn(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[Turn]:
    """What the system column says, as a list of one turn, or of none."""
    text = row.get(columns.get("system", ""))
    return [Turn("system", _text(text))] if text else []


def _field(row: Any, name: str) -> Any:
    """The value of a column that a row must have."""
    if not isinstance(row, dict):
        raise BadRow("not an object with columns")
    if row.get(name) is None:
        raise BadRow(f"no {name}")
    return row[name]


def _text(value: Any) -> str:
    """The value, if it is text that UTF-8 can hold: JSON can spell half of a surrogate pair."""
    if not isinstance(value, str):
        raise BadRow("a value is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow("a text has half of a surrogate pair") from None
    return value


def _checked(turns: list[Turn]) -> tuple[Turn, ...]:
    """The turns, if after a system turn questions and answers alternate and an answer is last."""
    rest = turns[1:] if turns and turns[0].role == "system" else turns
    for index, turn in enumerate(rest):
        expected = QUESTIONS if index % 2 == 0 else ANSWERS
        if turn.role not in expected:
            raise BadRow("questions and answers do not alternate")
    if not rest or len(rest) % 2 != 0:
        raise BadRow("no answer at the end")
    return tuple(turns)
