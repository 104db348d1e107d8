"""The files beside the weights that describe a tokenizer: read once, and handed on as bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.settings.text_files import decode, parse_object, read_bytes

# The files that transformers writes for a tokenizer. They are kept beside each adapter too, so that
# whoever serves it uses the tokenizer and the chat template that it was trained with.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class TokenizerFiles:
    """The content of each of TOKENIZER_FILES that a checkpoint's folder has, by its name."""

    folder: Path
    contents: Mapping[str, bytes]

    def text(self, name: str) -> str | None:
        """The text of a file, None where there is no such file. Raises RequestError."""
        if name not in self.contents:
            return None
        return decode(self.folder / name, self.contents[name])

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file, empty where there is no such file. Raises RequestError."""
        text = self.text(name)
        return {} if text is None else parse_object(self.folder / name, text)


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read all tokenizer files of a folder. Raises RequestError for one that cannot be read."""
    paths = {name: folder / name for name in TOKENIZER_FILES}
    return TokenizerFiles(
        folder, {name: read_bytes(path) for name, path in paths.items() if path.exists()}
    )
