"""The tiny checkpoint's tokenizer and chat template: Llama 3.1's form, as transformers reads it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from minilora.tiny.checkpoint import write_tiny
from minilora.tiny.tokenizer import SPECIAL_TOKENS, train_tokenizer
from tests.support.llama31 import LLAMA31
from tests.support.processes import SMALL

SYSTEM = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "{0}Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{1}<|eot_id|>"
)
ANSWER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
QUESTION = "<|start_header_id|>user<|end_header_id|>\n\n"
TOOL = {"type": "function", "function": {"name": "area", "parameters": {"r": "number"}}}
TOOL_TEXT = json.dumps(TOOL, indent=4) + "\n\n"
FORMAT = (
    'Respond in the format {"name": function name, "parameters": '
    "dictionary of argument name and its value}.Do not use variables.\n\n"
)


def test_special_tokens_follow_the_text_tokens(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(SMALL.vocab - len(SPECIAL_TOKENS), SMALL.vocab))
    assert len(tokenizer) == SMALL.vocab
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin_of_text|>", "<|eot_id|>")
    config = json.loads((tiny / "config.json").read_text())
    generation = json.loads((tiny / "generation_config.json").read_text())
    stops = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    assert tokenizer.convert_ids_to_tokens(config["eos_token_id"]) == stops
    assert generation["eos_token_id"] == config["eos_token_id"]
    assert generation["bos_token_id"] == config["bos_token_id"] == tokenizer.bos_token_id


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny / "tokenizer.json"))


@settings(deadline=None)  # a busy machine is no failure
@given(text=st.text())
@example(text="<|begin_of_text|>")
def test_every_text_survives(tokenizer: Tokenizer, text: str) -> None:
    plain = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(plain.ids, skip_special_tokens=False) == text
    # The real one's post-processor puts the beginning of text in front.
    assert tokenizer.encode(text).ids == [SMALL.vocab - len(SPECIAL_TOKENS), *plain.ids]


def test_text_is_split_as_llama_3_splits_it(tokenizer: Tokenizer) -> None:
    assert tokenizer.pre_tokenizer is not None
    parts = tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345\n\n  tokens, don't")
    # Byte-level spelling: \u0120 is a space, \u010a a line feed.
    wanted = ["It", "'s", "\u0120", "123", "45", "\u010a\u010a", "\u0120", "\u0120tokens", ","]
    assert [part for part, _ in parts] == [*wanted, "\u0120don", "'t"]


def rendered(
    tiny: Path, template: str | None, messages: list[tuple[str, str]], extra: dict[str, Any]
) -> str:
    """What transformers renders, by this template or by the checkpoint's own."""
    conversation: list[dict[str, Any]] = []
    for role, content in messages:
        if role == "call":
            call = {"name": "area", "arguments": json.loads(content)}
            conversation.append({"role": "assistant", "tool_calls": [{"function": call}]})
        else:
            conversation.append({"role": role, "content": content})
    reader = AutoTokenizer.from_pretrained(tiny)
    return str(
        reader.apply_chat_template(conversation, chat_template=template, tokenize=False, **extra)
    )


@pytest.mark.parametrize(
    ("messages", "extra", "wanted"),
    [
        (
            [("user", "\n Hi <b> ")],
            {"add_generation_prompt": True},
            SYSTEM.format("", "") + QUESTION + "Hi <b><|eot_id|>" + ANSWER,
        ),
        (
            [("system", " Be brief.\n"), ("user", "a"), ("assistant", " b "), ("user", "c")],
            {},
            SYSTEM.format("", "Be brief.")
            + QUESTION
            + "a<|eot_id|>"
            + ANSWER
            + "b<|eot_id|>"
            + QUESTION
            + "c<|eot_id|>",
        ),
    ],
    ids=["default", "system"],
)
def test_chat_template(
    tiny: Path, messages: list[tuple[str, str]], extra: dict[str, Any], wanted: str
) -> None:
    assert rendered(tiny, None, messages, extra) == wanted
    assert rendered(tiny, LLAMA31, messages, extra) == wanted


@pytest.mark.parametrize(
    ("messages", "extra", "wanted"),
    [
        (
            [("user", "r 2?"), ("call", '{"r": 2}'), ("tool", "12.57"), ("assistant", "12.57")],
            {"tools": [TOOL]},
            SYSTEM.format("Environment: ipython\n", "")
            + QUESTION
            + "Given the following functions, please respond with a JSON for a function call with "
            + "its proper arguments that best answers the given prompt.\n\n"
            + FORMAT
            + TOOL_TEXT
            + "r 2?<|eot_id|>"
            + ANSWER
            + '{"name": "area", "parameters": {"r": 2}}<|eot_id|>'
            + '<|start_header_id|>ipython<|end_header_id|>\n\n"12.57"<|eot_id|>'
            + ANSWER
            + "12.57<|eot_id|>",
        ),
        (
            [("user", "r 2?")],
            {"tools": [TOOL], "tools_in_user_message": False},
            SYSTEM.format(
                "Environment: ipython\n",
                "You have access to the following functions. To call a function, please respond "
                f"with JSON for a function call.{FORMAT}{TOOL_TEXT}",
            )
            + QUESTION
            + "r 2?<|eot_id|>",
        ),
        (
            [("user", "r 2?"), ("call", '{"r": "2"}')],
            {"builtin_tools": ["area", "code_interpreter"]},
            SYSTEM.format("Environment: ipython\nTools: area\n\n", "")
            + QUESTION
            + "r 2?<|eot_id|>"
            + ANSWER
            + '<|python_tag|>area.call(r="2")<|eom_id|>',
        ),
    ],
    ids=["tools", "tools in system", "built-in tools"],
)
def test_the_chat_template_of_other_tests_has_tools(
    tiny: Path, messages: list[tuple[str, str]], extra: dict[str, Any], wanted: str
) -> None:
    """The tiny checkpoint's own is shorter."""
    assert rendered(tiny, LLAMA31, messages, extra) == wanted


@pytest.mark.parametrize("messages", [[("call", '{"r": 2}')], [("tool", "12.57")]])
def test_the_tiny_chat_template_refuses_tools(tiny: Path, messages: list[tuple[str, str]]) -> None:
    with pytest.raises(TemplateError, match="the tiny checkpoint's chat template knows no tools"):
        rendered(tiny, None, [("user", "r 2?"), *messages], {})


@pytest.mark.parametrize("vocab", [266, 100_000])
def test_vocabulary_that_the_text_cannot_give(tmp_path: Path, vocab: int) -> None:
    with pytest.raises(ValueError, match=f"vocab {vocab}: from 267 to"):
        write_tiny(tmp_path, replace(SMALL, vocab=vocab))


@pytest.mark.parametrize("vocab", [267, 400])
def test_other_vocabularies(vocab: int) -> None:
    assert train_tokenizer(vocab).get_vocab_size() == vocab
