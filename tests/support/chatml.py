"""Qwen's tokenizer in small, and chat templates that write what those of Qwen2.5 and Qwen3 write.

Both templates are written for these tests. They have all that the published ones do with
conversations: Qwen2.5's default system message, calls and results of tools, and what Qwen3's does
with thoughts. The latter leaves them out of answers before the last question, and gives the very
last answer an empty pair of <think> tags if it has none. Descriptions of tools are not in them.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from minilora.data.conversations import Conversation, Turn
from tests.support.llama31 import CORPUS, NORMAL, talk

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Tokens of their own, but not special: where a text has one, it is this token.
PLAIN_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
THINK_TOKENS = ("<think>", "</think>")
# As in Qwen2Tokenizer of transformers: digits one by one.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

MACROS = r"""
{%- macro turn(role, text) %}
    {{- "<|im_start|>" ~ role ~ "\n" ~ text ~ "<|im_end|>\n" }}
{%- endmacro %}
{%- macro result(index) %}
    {%- if index == 0 or messages[index - 1].role != "tool" %}{{ "<|im_start|>user" }}{% endif %}
    {{- "\n<tool_response>\n" ~ messages[index].content ~ "\n</tool_response>" }}
    {%- if index + 1 == messages | length or messages[index + 1].role != "tool" %}
        {{- "<|im_end|>\n" }}
    {%- endif %}
{%- endmacro %}
{%- macro call(tool) %}
    {{- '<tool_call>\n{"name": "' ~ tool.function.name ~ '", "arguments": ' }}
    {{- tool.function.arguments | tojson ~ "}\n</tool_call>" }}
{%- endmacro %}
"""
QWEN25 = (
    MACROS
    + r"""
{%- if messages[0].role != "system" %}{{ turn("system", "DEFAULT") }}{% endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}{{ result(loop.index0) }}
    {%- elif message.tool_calls %}
        {{- "<|im_start|>assistant" ~ ("\n" ~ message.content if message.content else "") }}
        {%- for tool in message.tool_calls %}{{ "\n" ~ call(tool) }}{% endfor %}
        {{- "<|im_end|>\n" }}
    {%- else %}{{ turn(message.role, message.content) }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}
""".replace("DEFAULT", DEFAULT_SYSTEM)
)
QWEN3 = (
    MACROS
    + r"""
{%- set ns = namespace(question=messages | length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and not ns.found and not (
        message.content.startswith("<tool_response>") and
        message.content.endswith("</tool_response>")) %}
        {%- set ns.found = true %}
        {%- set ns.question = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "tool" %}{{ result(loop.index0) }}
    {%- elif message.role != "assistant" %}{{ turn(message.role, message.content) }}
    {%- else %}
        {%- set content = message.content if message.content is string else "" %}
        {%- set thoughts = "" %}
        {%- if "</think>" in content %}
            {%- set thoughts = content.split("</think>")[0].rstrip("\n").split("<think>")[-1] %}
            {%- set thoughts = thoughts.lstrip("\n") %}
            {%- set content = content.split("</think>")[-1].lstrip("\n") %}
        {%- endif %}
        {{- "<|im_start|>assistant\n" }}
        {%- if loop.index0 > ns.question and (loop.last or thoughts) %}
            {{- "<think>\n" ~ thoughts.strip("\n") ~ "\n</think>\n\n" ~ content.lstrip("\n") }}
        {%- else %}{{ content }}{% endif %}
        {%- for tool in message.tool_calls or [] %}
            {{- ("\n" if content or not loop.first else "") ~ call(tool) }}
        {%- endfor %}
        {{- "<|im_end|>\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- "<think>\n\n</think>\n\n" }}
    {%- endif %}
{%- endif %}
"""
)


def write_qwen(folder: Path, template: str, thinks: bool) -> Path:
    """A checkpoint's tokenizer files in Qwen's form. thinks: whether <think> is a token (Qwen3)."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([CORPUS + "think tool call response"] * 4, trainer)
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    plain = PLAIN_TOKENS + (THINK_TOKENS if thinks else ())
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain])
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "added_tokens_decoder": {
            str(number): {"content": token.content, "special": token.special}
            for number, token in backend.get_added_tokens_decoder().items()
        },
        "additional_special_tokens": list(SPECIALS[1:]),
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    stops = [backend.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
    generation = json.dumps({"eos_token_id": stops})
    (folder / "generation_config.json").write_text(generation, encoding="utf-8")
    return folder


CALL = '[{"name": "date", "arguments": {"zone": "caf\u00e9 <b>", "n": 1}}]'
TWO_CALLS = '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"x": [1, 2]}}]'
THOUGHT = "<think>\nThe fox is lazy.\n\nOr the dog?\n</think>\n\n"


def with_tools(thought: str, *later: Turn) -> Conversation:
    """A question that takes two calls of tools, answered with a thought, and what comes later."""
    turns = [
        Turn("user", "What date?"),
        Turn("call", CALL),
        Turn("tool", '{"date": "26 \u4e16"}'),
        Turn("call", TWO_CALLS),
        Turn("tool", "r"),
        Turn("assistant", f"{thought}26 Jul"),
    ]
    return Conversation((*turns, *later), "x")


LATER = (Turn("user", "And then?"), Turn("assistant", "Aug"))
# NORMAL has multi-turn, system and tool rows; these have thoughts.
THINKING = [
    talk("one", f"{THOUGHT}two"),
    talk("one", f"{THOUGHT}two", system="Be brief."),
    talk("one", f"{THOUGHT}two", "three", f"{THOUGHT}four", "five", "six"),
    talk("one", "two", "three", f"{THOUGHT}four"),
    talk("one", "<think>\n\n</think>\n\ntwo", "three", "<think></think>four"),
    talk("one", "no end <think> here", "three", "\n\n  four"),
    talk("<think>\nq\n</think>\n\none", f"{THOUGHT}two", "three", "four"),
    with_tools(""),
    with_tools(THOUGHT),
    with_tools(THOUGHT, *LATER),
]
# Composed characters that NFC changes, and special tokens in the texts of users.
TEXTS = [talk("e\u0301 caf\u00e9", "na\u0131\u0308ve e\u0301", "\u212b", "\u1100\u1161 \u0301x")]
CONVERSATIONS = [*NORMAL, *THINKING, *TEXTS]
