"""How one setting is declared and checked: type, allowed values and limits."""

import math
import operator
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import Field, field
from typing import Any

LIMITS: Mapping[str, tuple[Callable[[Any, Any], bool], str]] = {
    "above": (operator.gt, "above"),
    "at_least": (operator.ge, "at least"),
    "below": (operator.lt, "below"),
    "at_most": (operator.le, "at most"),
}
KINDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list of names",
}
# Nothing here is counted past 1e12; a float may be anything but nan and infinity.
LARGEST: Mapping[type, float] = {int: 10**12, float: sys.float_info.max}
TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")


def setting(default: Any, text: str, *, choices: tuple[str, ...] = (), **limits: float) -> Any:
    """Declare one setting: default, its line of --help, allowed values and limits (see LIMITS)."""
    assert limits.keys() <= LIMITS.keys(), limits
    return field(default=default, metadata={"help": text, "choices": choices, "limits": limits})


def kind_of(item: "Field[Any]") -> tuple[type, bool]:
    """The declared type of a setting as (bool | int | float | str | tuple, may it be None)."""
    parts = typing.get_args(item.type) if isinstance(item.type, types.UnionType) else (item.type,)
    inner = next(part for part in parts if part is not types.NoneType)
    return typing.get_origin(inner) or inner, types.NoneType in parts


def typed(item: "Field[Any]", raw: object) -> Any:
    """Turn a value as it was written (text, or a list of texts) into the declared type.

    Raises ValueError saying what the text is not.
    """
    kind = kind_of(item)[0]
    if kind is tuple:
        # LLaMA-Factory takes "a,b", a YAML list, and "[a,b]" on the command line.
        parts = raw.strip("[]").split(",") if isinstance(raw, str) else raw
        if isinstance(parts, list) and all(isinstance(part, str) for part in parts):
            names = tuple(part.strip(" '\"") for part in parts)
            if any(names):
                return tuple(name for name in names if name)
    elif isinstance(raw, str):
        text = raw.strip().lower()
        if kind is str:
            return raw
        if kind is bool and text in TRUE + FALSE:
            return text in TRUE
        if kind in (int, float):
            try:
                return int(text) if kind is int else float(text)
            except ValueError:
                # "10.0" and "1e5" are whole numbers too.
                if kind is int and (number := _float(text)).is_integer():
                    return int(number)
    raise ValueError(f"{raw!r} is not {KINDS[kind]}")


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def value_problems(item: "Field[Any]", value: Any, name: str) -> list[str]:
    """What is wrong with one value by its declared type, choices and limits."""
    kind, optional = kind_of(item)
    if value is None and optional:
        return []
    wanted = KINDS[kind]
    # bool is a subclass of int, but "lora_rank: true" is a mistake; 1 is fine as a float.
    right = type(value) is kind or (kind is float and type(value) is int)
    if kind is tuple and right:
        right = all(isinstance(part, str) and part for part in value)
    if not right:
        return [f"{name}: {value!r} is not {wanted}"]
    if kind in LARGEST and not abs(value) <= LARGEST[kind]:
        return [f"{name}: {value} is out of range"]
    if kind is str and (not value or "\0" in value):
        return [f"{name}: {value!r} is no usable text; leave the key out for its default"]
    choices = item.metadata["choices"]
    if choices and value not in choices:
        return [f"{name}: {value!r} is not one of {', '.join(choices)}"]
    return [
        f"{name}: {value} must be {LIMITS[limit][1]} {bound}"
        for limit, bound in item.metadata["limits"].items()
        if not LIMITS[limit][0](value, bound)
    ]
