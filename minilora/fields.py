"""How one setting is declared and checked: type, allowed values and limits."""

import operator
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import Field, field
from typing import Any

LIMITS: Mapping[str, tuple[Callable[[Any, Any], bool], str]] = types.MappingProxyType(
    {
        "above": (operator.gt, "above"),
        "at_least": (operator.ge, "at least"),
        "below": (operator.lt, "below"),
        "at_most": (operator.le, "at most"),
    }
)
KINDS: Mapping[type, str] = types.MappingProxyType(
    {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        tuple: "a list of names",
    }
)
# Nothing here is counted past 1e12; a float may be anything but nan and infinity.
LARGEST: Mapping[type, float] = types.MappingProxyType({int: 10**12, float: sys.float_info.max})


def setting(default: Any, text: str, *, choices: tuple[str, ...] = (), **limits: float) -> Any:
    """Declare one setting: default, its line of --help, allowed values and limits (see LIMITS)."""
    assert limits.keys() <= LIMITS.keys(), limits
    return field(default=default, metadata={"help": text, "choices": choices, "limits": limits})


def kind_of(item: "Field[Any]") -> tuple[type, bool]:
    """The declared type of a setting as (bool | int | float | str | tuple, may it be None)."""
    parts = typing.get_args(item.type) if isinstance(item.type, types.UnionType) else (item.type,)
    inner = next(part for part in parts if part is not types.NoneType)
    return typing.get_origin(inner) or inner, types.NoneType in parts


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
