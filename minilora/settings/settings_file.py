"""Read a settings file, YAML or JSON: every value as it was written, and on which line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minilora.settings.errors import RequestError
from minilora.settings.text_files import parse_json, read_text

# A value before its setting gives it a type: scalars are text, and None is null.
Raw = str | list[Any] | dict[Any, Any] | None

# The ways to write null in YAML 1.1.
NULL = ("", "~", "null", "Null", "NULL")

_NEEDED = "settings; write one `key: value` per line, such as `lora_rank: 16`"


@dataclass(frozen=True)
class Given:
    """One value as the user wrote it, and where: "run.yaml:12" or "command line"."""

    raw: Raw
    origin: str


def read_file(path: str) -> tuple[dict[str, Given], list[str]]:
    """Read a YAML or JSON file of settings. Returns key -> value, and a problem for each repeat.

    Raises RequestError when there is no such file, or it is no mapping of keys to values.
    """
    try:
        text = read_text(Path(path))
    except RequestError as error:
        # Any word of the command line without dashes is taken for the file, so say what it is.
        raise RequestError([f"settings file: {problem}" for problem in error.problems]) from None

    return _read_json(path, text) if path.endswith(".json") else _read_yaml(path, text)


def _read_yaml(path: str, text: str) -> tuple[dict[str, Given], list[str]]:
    given: dict[str, Given] = {}
    repeated = []
    try:
        # BaseLoader leaves every scalar as it was written. YAML 1.1 would read `no` as false and
        # `5e-5` as text, and only the setting knows which type it needs.
        loader = yaml.BaseLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise RequestError([f"{path}: empty: no {_NEEDED}"])
        if not isinstance(node, yaml.MappingNode):
            raise RequestError([f"{path}: not {_NEEDED}"])

        # The nodes know their lines; a dictionary made by the loader would not.
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node, deep=True))
            origin = f"{path}:{key_node.start_mark.line + 1}"
            raw: Raw = loader.construct_object(value_node, deep=True)
            # Quotes make text of any scalar: `template: ""` is not null.
            if isinstance(raw, str) and value_node.style is None and raw in NULL:
                raw = None
            if key in given:
                repeated.append(f"{key} ({origin}) stands already at {given[key].origin}")
            given[key] = Given(raw, origin)
    except RecursionError:
        problem = f"{path}: not YAML that can be read: nested too deeply"
        raise RequestError([problem]) from None
    except yaml.YAMLError as error:
        raise RequestError([_yaml_problem(path, error)]) from None
    return given, repeated


def _yaml_problem(path: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"{path}:{mark.line + 1}" if mark else path
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "broken"
    return f"{place}: not YAML: {reason}; correct that line (`key: value`, spaces instead of tabs)"


def _read_json(path: str, text: str) -> tuple[dict[str, Given], list[str]]:
    repeated: list[str] = []

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        repeated.extend(f"{name} ({path}) stands there more than once" for name in twice)
        # Booleans as YAML has them: the setting decides what is one.
        return {name: str(raw).lower() if isinstance(raw, bool) else raw for name, raw in pairs}

    # As in YAML, numbers stay as they were written.
    loaded = parse_json(
        path,
        text,
        object_pairs_hook=mapping,
        parse_int=str,
        parse_float=str,
        parse_constant=str,
    )
    if not isinstance(loaded, dict):
        raise RequestError([f"{path}: not {_NEEDED}"])
    return {key: Given(raw, path) for key, raw in loaded.items()}, repeated
