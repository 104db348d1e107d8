"""LLaMA-Factory's qwen, qwen3 and mistral, and Mistral's tokenizers, against transformers' tokens.

What LLaMA-Factory writes is restated here by its rules: the pieces of every turn, each of which it
lets the tokenizer encode alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from minilora.data.chat import encode_texts, make_template, show
from minilora.data.conversations import Conversation, Turn
from minilora.data.tokenizer import load_tokenizer
from minilora.settings.errors import RequestError
from tests.support.chatml import CONVERSATIONS, QWEN3, write_qwen
from tests.support.llama31 import messages_of, talk
from tests.support.mistral import FORMS, write_mistral

QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# The text of special tokens in rows stays text here, in LLaMA-Factory it becomes the tokens.
ROWS = [row for row in CONVERSATIONS if "</s>" not in str(row)]


def qwen_pieces(turns: tuple[Turn, ...], thinks: bool, system: str) -> list[list[str]]:
    """The pieces of each message: questions and answers in turn."""
    messages: list[list[str]] = []
    if turns[0].role == "system":
        system, turns = turns[0].text or system, turns[1:]
    for turn in turns:
        pieces = []
        if not messages and system:
            pieces.append(f"<|im_start|>system\n{system}<|im_end|>\n")
        if turn.role == "user":
            pieces.append(f"<|im_start|>user\n{turn.text}<|im_end|>\n<|im_start|>assistant\n")
        elif turn.role == "tool":
            pieces.append(
                f"<|im_start|>user\n<tool_response>\n{turn.text}\n</tool_response><|im_end|>\n"
                "<|im_start|>assistant\n"
            )
        else:
            text = turn.text
            if turn.role == "call":
                texts = [json.dumps(call, ensure_ascii=False) for call in json.loads(text)]
                text = "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in texts)
            if thinks and "<think>" not in turn.text and "</think>" not in turn.text:
                pieces.append("<think>\n\n</think>\n\n")
            pieces.append(f"{text}<|im_end|>\n")
        messages.append(pieces)
    return messages


def mistral_pieces(turns: tuple[Turn, ...]) -> list[list[str]]:
    messages: list[list[str]] = []
    system = ""
    if turns[0].role == "system":
        system, turns = turns[0].text, turns[1:]
    for turn in turns:
        pieces = [] if messages else ["<s>"]
        if turn.role == "user":
            before = f"{system}\n\n" if system and not messages else ""
            pieces.append(f"[INST] {before}{turn.text}[/INST]")
        elif turn.role == "tool":
            pieces.append(f'[TOOL_RESULTS] {{"content": {turn.text}}}[/TOOL_RESULTS]')
        elif turn.role == "call":
            pieces += [f"[TOOL_CALLS] {turn.text}", "</s>"]
        else:
            pieces += [f" {turn.text}", "</s>"]
        messages.append(pieces)
    return messages


def by_pieces(folder: Path, messages: list[list[str]]) -> tuple[list[int], list[bool]]:
    """The tokens of all pieces by transformers, and which of them are trained: every answer's."""
    oracle: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    ids: list[int] = []
    trained: list[bool] = []
    for index, pieces in enumerate(messages):
        for piece in pieces:
            tokens = oracle.encode(piece, add_special_tokens=False)
            ids += tokens
            trained += [index % 2 == 1] * len(tokens)
    return ids, trained


def encoded(name: str, folder: Path, conversation: Conversation) -> tuple[list[int], list[bool]]:
    """The same by a template of this package."""
    template = make_template(name, load_tokenizer(folder))
    ((ids, trained),), _ = template.encode([conversation], cutoff_len=10_000)
    return ids.tolist(), trained.tolist()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("qwen"), QWEN3, thinks=True)


@pytest.fixture(scope="module", params=FORMS)
def mistral(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mistral(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("conversation", ROWS)
@pytest.mark.parametrize("name", ["qwen", "qwen3", "qwen3_nothink"])
def test_qwens_are_llama_factorys(name: str, conversation: Conversation, qwen: Path) -> None:
    system = QWEN_SYSTEM if name == "qwen" else ""
    messages = qwen_pieces(conversation.turns, name == "qwen3", system)
    assert encoded(name, qwen, conversation) == by_pieces(qwen, messages)


@pytest.mark.parametrize("conversation", ROWS)
def test_mistral_is_llama_factorys(conversation: Conversation, mistral: Path) -> None:
    messages = mistral_pieces(conversation.turns)
    assert encoded("mistral", mistral, conversation) == by_pieces(mistral, messages)


@pytest.mark.parametrize("conversation", ROWS)
def test_mistrals_own_template_gives_the_tokens_of_transformers(
    conversation: Conversation, mistral: Path
) -> None:
    oracle: Any = PreTrainedTokenizerFast.from_pretrained(mistral)
    template = make_template(None, load_tokenizer(mistral))
    ((ids, _),), _ = template.encode([conversation], cutoff_len=10_000)
    messages = messages_of(conversation)
    assert ids.tolist() == oracle.apply_chat_template(messages, tokenize=True)["input_ids"]
    prompt = template.prompt(conversation.turns[:-1])
    asked = oracle.apply_chat_template(messages[:-1], add_generation_prompt=True)
    assert prompt == asked["input_ids"] == ids.tolist()[: len(prompt)]


def test_mistrals_trained_part_is_the_answer_and_its_end(mistral: Path) -> None:
    template = make_template(None, load_tokenizer(mistral))
    (sample,), _ = template.encode([talk("one", "two", "three", "four")], cutoff_len=999)
    spaceless = show(template.tokenizer, sample).replace(" ", "")
    assert spaceless == "<s>[INST]one[/INST][[two</s>]][INST]three[/INST][[four</s>]]"


def test_plain_texts_of_stage_pt_begin_as_transformers_begins_them(mistral: Path) -> None:
    oracle: Any = PreTrainedTokenizerFast.from_pretrained(mistral)
    text = Conversation((Turn("text", "A lazy dog. \n Hello caf\u00e9"),), "x")
    ((ids, _),) = encode_texts(load_tokenizer(mistral), [text], 999)
    assert ids.tolist() == [*oracle(text.turns[0].text)["input_ids"], oracle.eos_token_id]


def test_names_that_do_not_fit_are_refused(qwen: Path, mistral: Path) -> None:
    with pytest.raises(RequestError, match="mistral does not fit the tokenizer, which lacks .INST"):
        make_template("mistral", load_tokenizer(qwen))
    with pytest.raises(RequestError, match="qwen3 does not fit the tokenizer, which lacks <.im_st"):
        make_template("qwen3", load_tokenizer(mistral))
    with pytest.raises(RequestError, match="qwen2 is not known .did you mean qwen.*qwen3_nothink"):
        make_template("qwen2", load_tokenizer(qwen))


def test_the_settings_system_message_takes_the_place_of_qwens(qwen: Path) -> None:
    tokenizer = load_tokenizer(qwen)
    for given, expected in ((None, QWEN_SYSTEM), ("Obey.", "Obey.")):
        (sample,), _ = make_template("qwen", tokenizer, given).encode(
            [talk("q", "a")], cutoff_len=999
        )
        assert show(tokenizer, sample).startswith(f"<|im_start|>system\n{expected}<|im_end|>")
