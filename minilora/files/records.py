"""Dataclasses that are stored as JSON objects, read back with their fields checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from minilora.settings.errors import RequestError

STATE = "snapshot.json"

Record = TypeVar("Record")


def restored(kind: type[Record], saved: Mapping[str, Any], folder: Path) -> Record:
    """A dataclass from the values of its fields in snapshot.json.

    Raises RequestError if other fields are there than the dataclass has, as in a snapshot of
    another version of minilora, or a value is not of its field's type.
    """
    path = folder / STATE
    types = get_type_hints(kind)
    if saved.keys() != types.keys():
        names = ", ".join(sorted(saved.keys() ^ types.keys()))
        raise RequestError(
            [
                f"{path}: not a snapshot of this version of minilora, for it differs in {names}; "
                "resume with the version that wrote it, or begin anew from its adapter: "
                "adapter_name_or_path"
            ]
        )
    for name, value in saved.items():
        wanted = get_origin(types[name]) or types[name]
        # JSON, as Python writes it, keeps whole numbers and others apart.
        if type(value) is not wanted:
            raise RequestError([f"{path}: {name} is {value!r}, not of type {wanted.__name__}"])
    return kind(**saved)
