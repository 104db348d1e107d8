"""Prompts: rows that ask for an answer, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilora.data.chat import Template
from minilora.data.conversations import BadRow, Turn, to_turns
from minilora.data.sources import OPENAI_TAGS, Row, read_rows
from minilora.settings.errors import RequestError


def read_prompts(path: Path) -> list[Row]:
    """Rows with `prompt` or `messages`: of a .jsonl file, or one per line of a .txt file."""
    if path.suffix not in (".txt", ".jsonl") or not path.is_file():
        raise RequestError([f"--prompts: {path} is not a .txt or .jsonl file"])
    rows = read_rows(path)
    if path.suffix == ".txt":
        return [Row(row.place, {"prompt": row.value["text"]}) for row in rows]
    return rows


def encode_prompts(template: Template, room: float, rows: Sequence[Row]) -> list[list[int]]:
    """The tokens of every prompt, which may be `room` tokens long.

    Raises RequestError naming each prompt that cannot be answered.
    """
    prompts = []
    problems = []
    for row in rows:
        try:
            prompt = template.prompt(_turns(row.value))
        except BadRow as error:
            problems.append(f"{row.place}: {error}")
            continue
        if len(prompt) > room:
            problems.append(
                f"{row.place}: the prompt's {len(prompt)} tokens and --max_new_tokens exceed "
                "max_position_embeddings in config.json"
            )
        prompts.append(prompt)
    if problems:
        raise RequestError(problems)
    return prompts


def _turns(row: Any) -> tuple[Turn, ...]:
    """The turns of a row that asks. Raises BadRow."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if isinstance(row, dict) and "prompt" in row:
        messages = [{"role": "user", "content": row["prompt"]}]
    if not isinstance(messages, list):
        raise BadRow("neither a prompt nor a list of messages")

    # With an empty answer it is a conversation, and is checked as those that are trained on.
    conversation = {"messages": [*messages, {"role": "assistant", "content": ""}]}
    return to_turns(conversation, "openai", {"messages": "messages"}, OPENAI_TAGS)[:-1]
