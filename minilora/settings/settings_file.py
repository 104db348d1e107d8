"""Read a settings file, YAML or JSON: every value as it was written, and on which line."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minilora.settings.errors import RequestError

# A scalar is text, before its setting gives it a type; None is null.
Raw = str | list[Any] | dict[Any, Any] | None

NULL = ("", "~", "null", "Null", "NULL")
_WANTED = "settings; write one `key: value` per line, such as `lora_rank: 16`"


@dataclass(frozen=True)
class Given:
    """One value as the user wrote it, and where: "run.yaml:12" or "command line"."""

    raw: Raw
    origin: str


def read_file(path: str) -> tuple[dict[str, Given], list[str]]:
    """Read a YAML or JSON file of settings as (key -> value, keys that stand twice).

    Raises RequestError when there is no such file, or it is no mapping of keys to values.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        return (_read_json if path.endswith(".json") else _read_yaml)(path, text)
    except RecursionError:
        problem = f"{path}: nested too deeply; write key: value lines"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnicodeDecodeError):
            reason = "not UTF-8 text"
        problem = f"{path}: cannot read the settings: {reason}; check the path"
    raise RequestError([problem])


def _read_yaml(path: str, text: str) -> tuple[dict[str, Given], list[str]]:
    given: dict[str, Given] = {}
    problems = []
    # BaseLoader leaves every scalar as it was written: YAML 1.1 would read `no` as false and
    # `5e-5` as text, and only the setting knows which type it wants.
    try:
        loader = yaml.BaseLoader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise RequestError([f"{path}: {'not' if node else 'empty: no'} {_WANTED}"])
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node, deep=True))
            origin = f"{path}:{key_node.start_mark.line + 1}"
            raw: Raw = loader.construct_object(value_node, deep=True)
            # Quotes make text of any scalar: `template: ""` is not null.
            if isinstance(raw, str) and value_node.style is None and raw in NULL:
                raw = None
            if key in given:
                problems.append(f"{key} ({origin}) stands already at {given[key].origin}")
            given[key] = Given(raw, origin)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "broken"
        remedy = "correct that line (`key: value`, spaces instead of tabs)"
        raise RequestError([f"{place}: not YAML: {reason}; {remedy}"]) from None
    return given, problems


def _read_json(path: str, text: str) -> tuple[dict[str, Given], list[str]]:
    problems: list[str] = []

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        problems.extend(f"{name} ({path}) stands there more than once" for name in twice)
        return {name: str(raw).lower() if isinstance(raw, bool) else raw for name, raw in pairs}

    try:
        # Numbers stay as they were written, like in YAML.
        loaded = json.loads(
            text, object_pairs_hook=mapping, parse_int=str, parse_float=str, parse_constant=str
        )
    except json.JSONDecodeError as error:
        problem = f"{path}:{error.lineno}: not JSON: {error.msg}; correct that line"
        raise RequestError([problem]) from None
    if not isinstance(loaded, dict):
        raise RequestError([f"{path}: not {_WANTED}"])
    return {key: Given(raw, path) for key, raw in loaded.items()}, problems
