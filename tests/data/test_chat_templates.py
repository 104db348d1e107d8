"""Templates against transformers and LLaMA-Factory's strings."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from minilora.data.chat import make_template, show
from minilora.data.conversations import Conversation, Turn
from minilora.data.tokenizer import Tokenizer, load_tokenizer
from minilora.settings.errors import RequestError
from tests.support.llama31 import HEADER, NORMAL, messages_of, talk, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("conversation", NORMAL)
def test_the_own_template_gives_the_tokens_of_transformers(
    conversation: Conversation, tokenizer: Tokenizer, oracle: Any
) -> None:
    template = make_template(None, tokenizer)
    messages = messages_of(conversation)
    ((ids, _),), _ = template.encode([conversation], cutoff_len=10_000)
    assert ids.dtype == np.int32
    assert ids.tolist() == oracle.apply_chat_template(messages, tokenize=True)["input_ids"]
    prompt = template.prompt(conversation.turns[:-1])
    expected = oracle.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert prompt == expected
    assert ids.tolist()[: len(prompt)] == prompt


def test_the_own_template_trains_answers_with_their_end_and_nothing_else(
    tokenizer: Tokenizer,
) -> None:
    template = make_template(None, tokenizer)
    (first, second), tally = template.encode([NORMAL[2], NORMAL[4]], cutoff_len=10_000)
    user = "<|start_header_id|>user<|end_header_id|>\n\n"
    assistant = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert show(tokenizer, first) == (
        f"{HEADER}<|eot_id|>{user}one<|eot_id|>{assistant}[[two<|eot_id|>]]"
        f"{user}three<|eot_id|>{assistant}[[four<|eot_id|>]]"
        f"{user}five<|eot_id|>{assistant}[[six<|eot_id|>]]"
    )
    assert show(tokenizer, second, colour=True) == (
        f"{HEADER}both<|eot_id|>{user}spaces before<|eot_id|>{assistant}"
        "\x1b[32mand after<|eot_id|>\x1b[0m"
    )
    assert first[1].dtype == np.bool_
    assert (tally.kept, tally.dropped) == (2, {})


def test_llama3_is_llama_factorys(tokenizer: Tokenizer) -> None:
    template = make_template("llama3", tokenizer)
    (one, two), _ = template.encode(
        [talk(" a\n", "\n\n b ", "c", "d", system=" S "), talk("q", "", system="")], cutoff_len=999
    )
    assert show(tokenizer, one) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n S <|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n a\n<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[\n\n b <|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[d<|eot_id|>]]"
    )
    assert show(tokenizer, two) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[<|eot_id|>]]"
    )
    source = template.prompt(talk(" a\n", system=" S ").turns)
    answer = tokenizer.backend.encode("\n\n b ").ids  # encoded apart from the header's "\n\n"
    assert one[0].tolist()[: len(source) + len(answer)] == source + answer


def test_llama3_shows_tool_calls_as_llama_factory_does(tokenizer: Tokenizer) -> None:
    calls = [{"name": name, "arguments": {"n": 1}} for name in ("f", "g")]
    turns = (
        Turn("user", "q"),
        Turn("call", json.dumps(calls)),
        Turn("tool", "r"),
        Turn("call", json.dumps(calls[:1])),
    )
    (sample,), _ = make_template("llama3", tokenizer).encode(
        [Conversation(turns, "")], cutoff_len=999
    )
    assert show(tokenizer, sample).split("user<|end_header_id|>")[1] == (
        "\n\nq<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '[[[{"name": "f", "parameters": {"n": 1}}, {"name": "g", "parameters": {"n": 1}}]'
        "<|eot_id|>]]<|start_header_id|>ipython<|end_header_id|>\n\nr<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '[[{"name": "f", "parameters": {"n": 1}}<|eot_id|>]]'
    )


@pytest.mark.parametrize("said", ["", "<think>look first</think>\n"])
def test_llama3_joins_results_of_parallel_calls_and_keeps_what_is_said_before(
    said: str, tokenizer: Tokenizer
) -> None:
    """LLaMA-Factory's OpenAI converter joins the results, its FunctionFormatter the thought."""
    calls = json.dumps([{"name": "f", "arguments": {"n": 1}}])
    turns = (
        Turn("user", "q"),
        Turn("call", calls, before_calls=said),
        Turn("tool", "r"),
        Turn("tool", "s"),
        Turn("assistant", "a"),
    )
    (sample,), _ = make_template("llama3", tokenizer).encode(
        [Conversation(turns, "")], cutoff_len=999
    )
    assert show(tokenizer, sample).split("user<|end_header_id|>")[1] == (
        "\n\nq<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        f'[[{said}{{"name": "f", "parameters": {{"n": 1}}}}<|eot_id|>]]'
        "<|start_header_id|>ipython<|end_header_id|>\n\n"
        "r\n</tool_response>\n<tool_response>\ns<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[a<|eot_id|>]]"
    )


def test_an_own_template_gets_parallel_results_as_transformers_does(tmp_path: Path) -> None:
    text = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}: {{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}"
        "{{ call.function.arguments | tojson }}{% endfor %}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant: {% endif %}"
    )
    template = template_of(tmp_path, text)
    oracle: Any = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    calls = [{"name": name, "arguments": {"n": 1}} for name in ("f", "g")]
    turns = (
        Turn("user", "q"),
        Turn("call", json.dumps(calls), before_calls="Let me look. "),
        Turn("tool", "r"),
        Turn("tool", "s"),
        Turn("assistant", "a"),
    )
    (sample,), _ = template.encode([Conversation(turns, "")], cutoff_len=999)
    tool_calls = [{"type": "function", "function": call} for call in calls]
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "Let me look. ", "tool_calls": tool_calls},
        {"role": "tool", "content": "r"},
        {"role": "tool", "content": "s"},
        {"role": "assistant", "content": "a"},
    ]
    assert sample[0].tolist() == oracle.apply_chat_template(messages)["input_ids"]
    assert show(template.tokenizer, sample).count("[[") == 2


def test_a_template_that_opens_answers_itself_is_named_for_it(tmp_path: Path) -> None:
    """DeepSeek-R1-Distill-Llama's ends a prompt with <think>, and leaves that out of answers."""
    text = (
        "{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}{% else %}Assistant: "
        "{{ m.content.split('</think>')[-1] }}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant: <think>\n{% endif %}"
    )
    with pytest.raises(RequestError) as refused:
        template_of(tmp_path, text).encode([talk("2 + 2", "<think>\nso\n</think>4")], cutoff_len=99)
    assert "opens an answer with '<think>\\n' when it asks for one" in str(refused.value)
    assert "chat_template.jinja" in str(refused.value) and "llama3" not in str(refused.value)


def template_of(folder: Path, text: str) -> Any:
    return make_template(None, load_tokenizer(write_folder(folder, chat_template=text)))


def test_template_features_match_transformers(tmp_path: Path) -> None:
    text = (
        "{{ bos_token }}{{ tools is none }}{{ documents is none }}{{ pad_token }}"
        "{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}\n"
        "  {% if m.role == 'assistant' %}\n{% generation %}{{ m.content | tojson(indent=2) }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content | tojson }}&{% endif %}"
        "{% endfor %}"
    )
    template = template_of(tmp_path, text)
    oracle: Any = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    conversation = talk("a <b> & 'caf\u00e9'", "yes", "\u2028", "no")
    ((ids, _),), _ = template.encode([conversation], cutoff_len=999)
    assert ids.tolist() == oracle.apply_chat_template(messages_of(conversation))["input_ids"]


def test_the_date_is_fixed(tmp_path: Path) -> None:
    text = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    template = template_of(tmp_path, text)
    (sample,), _ = template.encode([talk("q", "a")], cutoff_len=999)
    assert show(template.tokenizer, sample) == "26 Jul 2024q[[a]]"


def test_bad_templates_are_refused(tmp_path: Path) -> None:
    forgetful = "{% for m in messages %}{{ m.content if loop.last else '' }}{% endfor %}"
    endless = "{% for i in range(99999) %}{{ messages[0].content * 99 }}{% endfor %}"
    with pytest.raises(RequestError, match="differently once more turns follow"):
        template_of(tmp_path, forgetful).encode([talk("a", "b", "c", "d")], cutoff_len=99)
    with pytest.raises(RequestError, match="writes more than"):
        template_of(tmp_path, endless).encode([talk("word", "b")], cutoff_len=99)
    with pytest.raises(RequestError, match="chat template, line 2: "):
        template_of(tmp_path, "\n{% if %}")
    unsafe = "{{ messages.append(1) }}{{ ''.__class__.__mro__ }}"
    with pytest.raises(RequestError, match="refuses it"):
        template_of(tmp_path, unsafe).encode([talk("a", "b")], cutoff_len=99)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0), "the clock of none of them runs on"


def test_rows_that_the_template_refuses_are_dropped_and_counted(tokenizer: Tokenizer) -> None:
    calls = json.dumps([{"name": "f", "arguments": {}}] * 2)
    bad = Conversation((Turn("user", "q"), Turn("call", calls)), "data.jsonl:3")
    encoded, tally = make_template(None, tokenizer).encode([talk("a", "b"), bad], cutoff_len=99)
    assert len(encoded) == 1
    ((reason, places),) = tally.dropped.items()
    assert "only supports single tool-calls at once" in reason
    assert places == ("data.jsonl:3",)


def test_tokens_may_reach_over_the_start_of_an_answer(tmp_path: Path) -> None:
    text = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    template = template_of(tmp_path, text)
    oracle: Any = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    conversation = talk("hello", "lazy dog", "hello", "fox")
    (sample,), _ = template.encode([conversation], cutoff_len=999)
    expected = oracle.apply_chat_template(messages_of(conversation))["input_ids"]
    assert sample[0].tolist() == expected
    # " lazy" is one token, and begins before the answer does.
    shown = "user: hello\nassistant: lazy[[ dog\n]]user: hello\nassistant: fox[[\n]]"
    assert show(template.tokenizer, sample) == f"<|begin_of_text|>{shown}"
    special = talk("<|eot_id|> hello", "lazy dog", "hello", "fox")
    (sample,), _ = template.encode([special], cutoff_len=999)
    shown = shown.replace("user: hello", "user: <|eot_id|> hello", 1)
    assert show(template.tokenizer, sample) == f"<|begin_of_text|>{shown}"


def test_a_special_token_written_half_before_an_answer_belongs_to_what_is_before(
    tmp_path: Path,
) -> None:
    text = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|eot"
        "{% else %}_id|>{{ m.content }}{% endif %}{% endfor %}"
    )
    template = template_of(tmp_path, text)
    (sample,), _ = template.encode([talk("fox", "dog", "<|eot_id|>", "fox")], cutoff_len=99)
    shown = "fox<|eot_id|>[[dog]]<|eot_id|><|eot_id|>[[fox]]"
    assert show(template.tokenizer, sample) == shown
    assert sample[0].tolist().count(template.tokenizer.specials["<|eot_id|>"]) == 2


def test_llama3_tokens_never_reach_over_the_start_of_an_answer(tokenizer: Tokenizer) -> None:
    header, answer = "<|end_header_id|>\n\n", "\n\ndog"
    (sample,), _ = make_template("llama3", tokenizer).encode([talk("q", answer)], cutoff_len=99)
    apart = tokenizer.backend.encode("\n\n").ids + tokenizer.backend.encode(answer).ids
    assert apart != tokenizer.backend.encode("\n\n" + answer).ids  # else the case is not tried
    assert sample[0].tolist()[-len(apart) - 1 : -1] == apart
    assert f"{header}[[{answer}" in show(tokenizer, sample)
