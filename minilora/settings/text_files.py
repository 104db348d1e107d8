"""Text and JSON files: what is wrong with one is said with its name and line."""

import json
from pathlib import Path
from typing import Any

from minilora.settings.errors import RequestError


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises RequestError."""
    data = b""
    if path.exists() and not path.is_file():
        raise RequestError([f"{path}: not a plain file"])  # a pipe would never end
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise RequestError([f"{path}: {str(error.strerror).lower()}"]) from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RequestError([f"{path}:{line}: not UTF-8; save the file as UTF-8"]) from None


def parse_json(path: Path, text: str) -> Any:
    """The value that the text of this file spells. Raises RequestError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError([f"{path}:{error.lineno}: not JSON: {error.msg}"]) from None
    except (ValueError, RecursionError) as error:
        raise RequestError([f"{path}: not JSON that can be read: {error}"]) from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises RequestError."""
    value = parse_json(path, read_text(path))
    if not isinstance(value, dict):
        raise RequestError([f"{path}: a JSON object is needed, not {type(value).__name__}"])
    return value
