"""The files beside tokenizer.json that name special tokens and hold the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.data.tokenizer_files import TokenizerFiles
from minilora.settings.errors import RequestError
from minilora.settings.text_files import read_json


def generation_stops(folder: Path) -> list[int]:
    """The tokens that end an answer by generation_config.json, which may be one or a list."""
    path = folder / "generation_config.json"
    stops = (read_json(path) if path.is_file() else {}).get("eos_token_id") or []
    if not isinstance(stops, list):
        stops = [stops]
    if not all(type(stop) is int for stop in stops):
        raise RequestError([f"{path}: eos_token_id: not a number"])
    return stops


def special_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name, from "bos_token": "<s>" or "bos_token": {"content": "<s>", ...}."""
    texts = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            texts[name] = text
    return texts


def chat_template(files: TokenizerFiles, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template of tokenizer_config.json: a string, or a list.

    Of a list it is the entry named `default`; the others are for tools or retrieval.
    """
    if "chat_template.jinja" in files.contents:
        return files.text("chat_template.jinja")
    template = config.get("chat_template")
    for entry in template if isinstance(template, list) else ():
        if isinstance(entry, dict) and entry.get("name") == "default":
            template = entry.get("template")
    return template if isinstance(template, str) else None
