"""One row of an alpaca, sharegpt, OpenAI-messages or plain-text file as a conversation.

The meaning of every column follows LLaMA-Factory (data/converter.py).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ANSWERS = ("assistant", "call")
# LLaMA-Factory's names for the roles, in the order in which messages list them.
ROLES = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool",
         "function_tag": "call", "system_tag": "system"}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """One message. role: system, user, assistant, tool (result), call (of tools), text (stage pt).

    The text of a call is a JSON list of {"name": ..., "arguments": {...}}.
    """

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """Perhaps a system turn, then questions and answers in turn. source: file and line or row."""

    turns: tuple[Turn, ...]
    source: str


class BadRow(ValueError):
    """Why a row cannot be used, in words that are the same for all such rows."""


def to_turns(
    row: Any, formatting: str, columns: Mapping[str, str], tags: Mapping[str, str]
) -> tuple[Turn, ...]:
    """The turns of a row.

    formatting: alpaca, sharegpt, openai or text. columns, tags: the file's names by LLaMA-Factory's
    keys. Raises BadRow.
    """
    if formatting == "text":
        text = _text(_field(row, columns["prompt"]))
        if not text.strip():
            raise BadRow("empty text")
        return (Turn("text", text),)
    if formatting == "alpaca":
        return _checked(_alpaca(row, columns))
    return _checked(_messages(row, columns, tags))


def _alpaca(row: Any, columns: Mapping[str, str]) -> list[Turn]:
    """instruction and input joined by a newline; earlier rounds of `history` before them."""
    answer = _text(_field(row, columns["response"]))
    history = row.get(columns.get("history", "")) or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise BadRow("history is not a list of [question, answer]")
    parts = [row.get(columns["prompt"]), row.get(columns.get("query", ""))]
    question = "\n".join(_text(part) for part in parts if part)
    turns = _system(row, columns)
    for earlier, reply in [*history, [question, answer]]:
        turns += [Turn("user", _text(earlier)), Turn("assistant", _text(reply))]
    return turns


def _messages(row: Any, columns: Mapping[str, str], tags: Mapping[str, str]) -> list[Turn]:
    """A list of messages; its own system message goes before that of the system column."""
    messages = _field(row, columns["messages"])
    if not isinstance(messages, list) or not all(isinstance(item, dict) for item in messages):
        raise BadRow("messages are not a list of objects")
    turns = [_message(message, tags) for message in messages]
    return turns if turns and turns[0].role == "system" else [*_system(row, columns), *turns]


def _message(message: Mapping[str, Any], tags: Mapping[str, str]) -> Turn:
    roles = {tags[tag]: role for tag, role in ROLES.items()}
    name = message.get(tags["role_tag"])
    if not isinstance(name, str) or name not in roles:
        raise BadRow(f"role {name!r} is none of {', '.join(roles)}")
    if message.get("tool_calls"):
        return Turn("call", _calls(message["tool_calls"]))
    text = _text(_field(message, tags["content_tag"]))
    if roles[name] != "call":
        return Turn(roles[name], text)
    try:
        return Turn("call", _calls(json.loads(text)))
    except json.JSONDecodeError:
        raise BadRow("a tool call is not JSON") from None


def _calls(calls: Any) -> str:
    """Tool calls in the one form of `Turn`, from OpenAI's form and from that of LLaMA-Factory."""
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        inner = call.get("function", call) if isinstance(call, dict) else {}
        name, arguments = inner.get("name"), inner.get("arguments")
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except json.JSONDecodeError:
            arguments = None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise BadRow("a tool call needs a name and an object of arguments")
        result.append({"name": name, "arguments": arguments})
    return _text(json.dumps(result, ensure_ascii=False))


def _system(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[Turn]:
    text = row.get(columns.get("system", ""))
    return [Turn("system", _text(text))] if text else []


def _field(row: Any, name: str) -> Any:
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
        if turn.role not in (ANSWERS if index % 2 else ("user", "tool")):
            raise BadRow("questions and answers do not alternate")
    if not rest or len(rest) % 2:
        raise BadRow("no answer at the end")
    return tuple(turns)
