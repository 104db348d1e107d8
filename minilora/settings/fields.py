"""How one setting is declared, read from text and checked: type, allowed values and limits."""

import json
import operator
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import Field, field
from typing import Any

LIMITS: Mapping[str, Callable[[Any, Any], bool]] = {
    "above": operator.gt,
    "at_least": operator.ge,
    "below": operator.lt,
    "at_most": operator.le,
}
KINDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list of names",
    dict: "names with whole numbers of at least 1, such as {q_proj: 16}",
}
# Nothing here is counted past 1e12; a float may be anything but nan and infinity.
LARGEST: Mapping[type, float] = {int: 10**12, float: sys.float_info.max}
# "a,b" and "[a, b]", with or without quotes: what is no regular expression.
PLAIN_NAMES = re.compile(r"""\s*\[?[-\w.,\s"']*\]?\s*""")
BOOLEANS: Mapping[str, bool] = {
    "true": True, "yes": True, "on": True, "1": True,
    "false": False, "no": False, "off": False, "0": False,
}  # fmt: skip


def setting(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    pattern: bool = False,
    **limits: float,
) -> Any:
    """Declare one setting: default, its line of --help, allowed values and limits (see LIMITS).

    pattern: a text that is no list of plain names stays whole, commas and all.
    """
    assert limits.keys() <= LIMITS.keys(), limits
    kept = {"help": text, "choices": choices, "limits": limits, "pattern": pattern}
    return field(default=default, metadata=kept)


def kind_of(item: "Field[Any]") -> tuple[type, bool]:
    """The declared type of a setting, one of KINDS, and whether it may be None."""
    parts = typing.get_args(item.type) if isinstance(item.type, types.UnionType) else (item.type,)
    inner = next(part for part in parts if part is not types.NoneType)
    return typing.get_origin(inner) or inner, types.NoneType in parts


def typed(item: "Field[Any]", raw: object) -> Any:
    """Turn a value as it was written (text, a list, a mapping) into the declared type.

    Raises ValueError saying what the text is not.
    """
    kind, _ = kind_of(item)
    text = raw.strip().lower() if isinstance(raw, str) else ""
    try:
        if kind is tuple:
            if item.metadata["pattern"] and isinstance(raw, str) and not PLAIN_NAMES.fullmatch(raw):
                return (raw.strip(),)
            return _names(raw)
        if kind is dict:
            return _numbers(raw)
        if kind is bool:
            return BOOLEANS[text]
        if kind in (int, float):
            return float(text) if kind is float else _whole(text)
        if isinstance(raw, str):
            return raw
    except (KeyError, ValueError, RecursionError):
        pass
    raise ValueError(f"{raw!r} is not {KINDS[kind]}")


def _names(raw: object) -> tuple[str, ...]:
    """LLaMA-Factory takes "a,b", a YAML list, and "[a,b]" on the command line."""
    parts = raw.strip("[]").split(",") if isinstance(raw, str) else raw
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError(raw)
    names = [part.strip(" '\"") for part in parts]
    if not any(names):
        raise ValueError(raw)
    return tuple(name for name in names if name)


def _numbers(raw: object) -> dict[str, int]:
    """A mapping in the file; on the command line its JSON text."""
    parts = json.loads(raw) if isinstance(raw, str) else raw
    if not isinstance(parts, dict) or not all(
        isinstance(part, int | str) for part in parts.values()
    ):
        raise ValueError(raw)
    return {str(name): _whole(str(value)) for name, value in parts.items()}


def _whole(text: str) -> int:
    """A whole number, which may be written "10.0" or "1e5" too."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def value_problems(item: "Field[Any]", value: Any, name: str) -> list[str]:
    """What is wrong with one value by its declared type, choices and limits."""
    kind, optional = kind_of(item)
    if value is None and optional:
        return []
    # bool is a subclass of int, but "lora_rank: true" is a mistake; 1 is fine as a float.
    right = type(value) is kind or (kind is float and type(value) is int)
    if not right or (kind is tuple and not all(isinstance(part, str) and part for part in value)):
        return [f"{name}: {value!r} is not {KINDS[kind]}"]
    if kind is dict and not all(
        isinstance(key, str) and key and type(number) is int and 1 <= number <= LARGEST[int]
        for key, number in value.items()
    ):
        return [f"{name}: {value!r} is not {KINDS[kind]}"]
    if kind in LARGEST and not abs(value) <= LARGEST[kind]:
        return [f"{name}: {value} is out of range"]
    if kind is str and (not value or "\0" in value):
        return [f"{name}: {value!r} is no usable text; leave the key out for its default"]
    choices = item.metadata["choices"]
    wrong = [part for part in (value if kind is tuple else [value]) if part not in choices]
    if choices and wrong:
        return [f"{name}: {wrong[0]!r} is not one of {', '.join(choices)}"]
    return [
        f"{name}: {value} must be {limit.replace('_', ' ')} {bound}"
        for limit, bound in item.metadata["limits"].items()
        if not LIMITS[limit](value, bound)
    ]
