"""Rows of messages that cannot be used, and the reasons."""

from __future__ import annotations

from typing import Any


def say(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    """A row of sharegpt messages."""
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
    (say(("human", "q"), ("function_call", "[" * 10**5)), "a tool call is not JSON"),
    (say(("human", "q"), ("function_call", "1" * 5000)), "a tool call is not JSON"),
    *(
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", **calls}]},
            "a tool call needs a name and an object of arguments",
        )
        for calls in (
            {"tool_calls": [{"function": "f"}]},
            {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            {"tool_calls": [{"function": {"name": "f", "arguments": "[" * 10**5}}]},
            {"tool_calls": [{"function": {"name": "f", "arguments": "1" * 5000}}]},
        )
    ),
    ({"conversations": "q"}, "messages are not a list of objects"),
    ({"conversations": ["q"]}, "messages are not a list of objects"),
    ({"conversations": None}, "no conversations"),
    ({}, "no conversations"),
    (["q"], "not an object with columns"),
    (None, "not an object with columns"),
]
