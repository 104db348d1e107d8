"""How one setting is declared, read from text, and checked: its type, choices and limits."""

from __future__ import annotations

import json
import operator
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import Field, field
from typing import Any

# The words in which a setting declares its limits, and the comparisons that must hold.
LIMITS: Mapping[str, Callable[[Any, Any], bool]] = {
    "above": operator.gt,
    "at_least": operator.ge,
    "below": operator.lt,
    "at_most": operator.le,
}

# The types that a setting can have, as messages call them.
KINDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list of names",
    dict: "names with whole numbers of at least 1, such as {q_proj: 16}",
}

# No count in a run comes near 1e12, and larger ones overflow in sums. A float may have any finite
# value.
LARGEST: Mapping[type, float] = {int: 10**12, float: sys.float_info.max}

# Text that is a list of names, such as "a,b" and "[a, b]", with or without quotes. Other text can
# only be a regular expression.
PLAIN_NAMES = re.compile(r"""\s*\[?[-\w.,\s"']*\]?\s*""")

# What YAML 1.1 and LLaMA-Factory's argument parser take for true and false.
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
    share: bool = False,
    **limits: float,
) -> Any:
    """Declare one setting.

    text: its line of --help; choices: the only values allowed; limits: see LIMITS
    pattern: text that is not a list of plain names stays as it is, commas and all
    share: a whole number of steps, or below 1 a share of the run
    """
    assert limits.keys() <= LIMITS.keys(), limits
    metadata = {
        "help": text,
        "choices": choices,
        "limits": limits,
        "pattern": pattern,
        "share": share,
    }
    return field(default=default, metadata=metadata)


def kind_of(item: Field[Any]) -> tuple[type, bool]:
    """The declared type of a setting, one of KINDS, and whether it may be None.

    The module that declares it must not postpone its annotations, or the type would be text.
    """
    parts = typing.get_args(item.type) if isinstance(item.type, types.UnionType) else (item.type,)
    inner = next(part for part in parts if part is not types.NoneType)
    return typing.get_origin(inner) or inner, types.NoneType in parts


def typed(item: Field[Any], raw: object) -> Any:
    """Turn a value as it was written (text, a list, a mapping) into the declared type.

    Raises ValueError saying what the text is not.
    """
    kind, _ = kind_of(item)
    try:
        if kind is tuple:
            return _names(raw, item.metadata["pattern"])
        if kind is dict:
            return _numbers_by_name(raw)
        if isinstance(raw, str) and item.metadata["share"]:
            return _steps_or_share(raw)
        if isinstance(raw, str):
            return _scalar(raw, kind)
    except (KeyError, ValueError, RecursionError):
        pass
    raise ValueError(f"{raw!r} is not {KINDS[kind]}")


def _scalar(raw: str, kind: type) -> bool | int | float | str:
    """Raises KeyError or ValueError for text that is no value of this type."""
    text = raw.strip().lower()
    if kind is bool:
        return BOOLEANS[text]
    if kind is int:
        return _whole_number(text)
    if kind is float:
        return float(text)
    return raw


def _steps_or_share(raw: str) -> int | float:
    """A number of steps as a whole number, so that 500 is not shown as 500.0."""
    number = float(raw)
    return int(number) if number.is_integer() else number


def _names(raw: object, pattern: bool) -> tuple[str, ...]:
    """LLaMA-Factory takes "a,b", a YAML list, and "[a,b]" on the command line."""
    if pattern and isinstance(raw, str) and not PLAIN_NAMES.fullmatch(raw):
        return (raw.strip(),)

    parts = raw.strip("[]").split(",") if isinstance(raw, str) else raw
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError(raw)
    stripped = (part.strip(" '\"") for part in parts)
    names = tuple(name for name in stripped if name)
    if not names:
        raise ValueError(raw)
    return names


def _numbers_by_name(raw: object) -> dict[str, int]:
    """A mapping in a file; on the command line the same as JSON text."""
    mapping = json.loads(raw) if isinstance(raw, str) else raw
    if not isinstance(mapping, dict):
        raise ValueError(raw)
    if not all(isinstance(value, int | str) for value in mapping.values()):
        raise ValueError(raw)
    return {str(name): _whole_number(str(value)) for name, value in mapping.items()}


def _whole_number(text: str) -> int:
    """A whole number, which may also be written as "10.0" or "1e5"."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def value_problems(item: Field[Any], value: Any, name: str) -> list[str]:
    """What is wrong with one value by its declared type, choices and limits.

    name: the setting as the messages call it, with the place that the value came from
    """
    kind, optional = kind_of(item)
    if value is None and optional:
        return []

    if not _is_of_kind(value, kind):
        return [f"{name}: {value!r} is not {KINDS[kind]}"]
    if kind in LARGEST and not abs(value) <= LARGEST[kind]:  # `not <=` is true for nan as well
        return [f"{name}: {value} is out of range"]
    if kind is str and (not value or "\0" in value):
        return [f"{name}: {value!r} is no usable text; leave the key out for its default"]

    if item.metadata["share"] and value >= 1 and value != int(value):
        return [f"{name}: {value} is neither a whole number of steps nor a share below 1"]

    choices = item.metadata["choices"]
    for part in value if kind is tuple else [value]:
        if choices and part not in choices:
            return [f"{name}: {part!r} is not one of {', '.join(choices)}"]

    return [
        f"{name}: {value} must be {limit.replace('_', ' ')} {bound}"
        for limit, bound in item.metadata["limits"].items()
        if not LIMITS[limit](value, bound)
    ]


def _is_of_kind(value: Any, kind: type) -> bool:
    """Whether a value that a file, a command line or Python code gave has the declared type."""
    if kind is float:
        return type(value) in (float, int)

    # Not isinstance: True is an int for Python, and `lora_rank: true` is a mistake.
    right = type(value) is kind
    if kind is tuple:
        return right and all(isinstance(part, str) and part for part in value)
    if kind is dict:
        return right and all(
            isinstance(name, str) and name and type(number) is int and 1 <= number <= LARGEST[int]
            for name, number in value.items()
        )
    return right
