"""Text that a chat template leaves out, and what becomes of such rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minilora.data.chat import (
    Template,
    make_template,
)
from minilora.data.conversations import Conversation, Turn
from minilora.data.tokenizer import Tokenizer, load_tokenizer
from minilora.settings.errors import RequestError
from tests.support.llama31 import NORMAL, talk, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


# Llama 3.0's own template knows no calls of tools, and DeepSeek's leaves out what an answer thinks.
LLAMA30 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)


def own_template(folder: Path, text: str) -> Template:
    return make_template(None, load_tokenizer(write_folder(folder, chat_template=text)))


THINKING = LLAMA30.replace("m['content']", "m['content'].split('</think>')[-1]")


CALLING = (
    Turn("user", "What is it?"),
    Turn("call", json.dumps([{"name": "look", "arguments": {"where": "here \u4f60"}}])),
    Turn("tool", '{"seen": "a\\tfox"}'),
    Turn("assistant", "a fox"),
)


@pytest.mark.parametrize(
    ("template", "turns", "lost"),
    [
        (LLAMA30, CALLING, "an answer"),
        (
            THINKING,
            (Turn("user", "2 + 2"), Turn("assistant", "<think>two twos</think>\n4")),
            "an answer",
        ),
        (
            LLAMA30.replace(
                "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
            ),
            talk("a", "b", system="S").turns,
            "a system message",
        ),
    ],
)
def test_a_template_that_drops_text_is_not_trained_on(
    template: str, turns: tuple[Turn, ...], lost: str, tmp_path: Path
) -> None:
    """More than 1 % of such rows end the run, as other unusable rows do."""
    own = own_template(tmp_path, template)
    row = Conversation(turns, "data.jsonl:3")
    found, tally = own.encode([talk("a", " <b>\n")] * 3 + [row], cutoff_len=99)
    assert len(found) == 3
    assert tally.dropped == {f"the template leaves out text of {lost}": ("data.jsonl:3",)}
    with pytest.raises(RequestError, match=f"too many.*9: the template leaves out text of {lost}"):
        own.encode([talk("a", "b")] * 90 + [row] * 9, cutoff_len=99)


@pytest.mark.parametrize("name", [None, "llama3"])
def test_a_template_may_trim_and_escape_and_loses_nothing(
    name: str | None, tokenizer: Tokenizer
) -> None:
    rows = [Conversation(CALLING, ""), talk(' "a"\n\tb\\ ', "\n c \u00e9 <|eot_id|> "), *NORMAL]
    _, tally = make_template(name, tokenizer).encode(rows, cutoff_len=9999)
    assert (tally.kept, tally.dropped) == (len(rows), {})
