"""Read text and JSON files. Messages name the file, and the line where it is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minilora.settings.errors import RequestError


def read_bytes(path: Path) -> bytes:
    """The content of a plain file. Raises RequestError."""
    try:
        # Reading a named pipe would wait for a writer that never comes.
        if path.exists() and not path.is_file():
            raise RequestError([f"{path}: not a plain file"])
        return path.read_bytes()
    except OSError as error:
        raise RequestError([f"{path}: {str(error.strerror).lower()}"]) from None
    except ValueError as error:  # a path with a zero byte
        raise RequestError([f"{path}: {error}"]) from None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises RequestError."""
    return decode(path, read_bytes(path))


def decode(path: Path, data: bytes) -> str:
    """The text that the content of this file spells in UTF-8. Raises RequestError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RequestError([f"{path}:{line}: not UTF-8; save the file as UTF-8"]) from None


def parse_json(path: Path | str, text: str, **options: Any) -> Any:
    """The value that the text of this file spells. options: of json.loads. Raises RequestError."""
    try:
        return json.loads(text, **options)
    except json.JSONDecodeError as error:
        problem = f"{path}:{error.lineno}: not JSON: {error.msg}; correct that line"
    except RecursionError:
        problem = f"{path}: not JSON that can be read: nested too deeply"
    except ValueError as error:  # a number with more digits than Python takes
        problem = f"{path}: not JSON that can be read: {error}"
    raise RequestError([problem])


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises RequestError."""
    return parse_object(path, read_text(path))


def parse_object(path: Path, text: str) -> dict[str, Any]:
    """The JSON object that the text of this file spells. Raises RequestError."""
    value = parse_json(path, text)
    if not isinstance(value, dict):
        raise RequestError([f"{path}: a JSON object is needed, not {type(value).__name__}"])
    return value
