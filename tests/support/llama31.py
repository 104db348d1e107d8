"""Llama-3.1-Instruct's tokenizer in small, its chat template, and conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from minilora.data.conversations import Conversation, Turn

# Written for this project; renders what Llama 3.1 Instruct's own template renders, tools included.
LLAMA31 = r"""
{%- macro open(role) %}{{ "<|start_header_id|>" ~ role ~ "<|end_header_id|>\n\n" }}{% endmacro %}
{%- macro functions() %}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument' }}
    {{- " name and its value}.Do not use variables.\n\n" }}
    {%- for tool in available %}{{ tool | tojson(indent=4) ~ "\n\n" }}{% endfor %}
{%- endmacro %}
{%- set available = custom_tools if custom_tools is defined else tools | default(none) %}
{%- set told_to_user = tools_in_user_message | default(true) %}
{%- set system = "" %}
{%- if messages[0].role == "system" %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}

{{- bos_token ~ open("system") }}
{%- if builtin_tools is defined or available is not none %}{{ "Environment: ipython\n" }}{% endif %}
{%- if builtin_tools is defined %}
    {{- "Tools: " ~ builtin_tools | reject("equalto", "code_interpreter") | join(", ") ~ "\n\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " ~ date_string | default("26 Jul 2024") ~ "\n\n" }}
{%- if available is not none and not told_to_user %}
    {{- "You have access to the following functions. To call a function, please respond with " }}
    {{- "JSON for a function call." ~ functions() }}
{%- endif %}
{{- system ~ "<|eot_id|>" }}

{%- if available is not none and told_to_user %}
    {%- if not messages %}
        {{- raise_exception("Tools are described in the first user message, and there is none") }}
    {%- endif %}
    {{- open("user") ~ "Given the following functions, please respond with a JSON for a " }}
    {{- "function call with its proper arguments that best answers the given prompt.\n\n" }}
    {{- functions() }}
    {{- messages[0].content | trim ~ "<|eot_id|>" }}
    {%- set messages = messages[1:] %}
{%- endif %}

{%- for message in messages %}
    {%- if message.tool_calls is defined %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- open("assistant") }}
        {%- if builtin_tools is defined and call.name in builtin_tools %}
            {{- "<|python_tag|>" ~ call.name ~ ".call(" }}
            {%- for name, value in call.arguments | items %}
                {{- name ~ '="' ~ value ~ '"' ~ ("" if loop.last else ", ") }}
            {%- endfor %}
            {{- ")" }}
        {%- else %}
            {{- '{"name": "' ~ call.name ~ '", "parameters": ' ~ call.arguments | tojson ~ "}" }}
        {%- endif %}
        {{- "<|eom_id|>" if builtin_tools is defined else "<|eot_id|>" }}
    {%- elif message.role in ("tool", "ipython") %}
        {{- open("ipython") ~ message.content | tojson ~ "<|eot_id|>" }}
    {%- else %}
        {{- open(message.role) ~ message.content | trim ~ "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ open("assistant") }}{% endif %}
"""

SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HEADER = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
)
CORPUS = (
    "The quick brown fox jumps over the lazy dog. What is it? It is a dog, hello there! "
    "Cutting Knowledge Date: December 2023 user assistant system ipython parameters\n\n"
    "Answer:\n\n\nyes. caf\u00e9 na\u00efve \u4f60\u597d\u4e16\u754c "
    "eot_id begin_of_text fox\n\n\n\ndog "
)


def write_folder(folder: Path, **changes: Any) -> Path:
    """A checkpoint's tokenizer files, made as Llama-3.1-Instruct's; `changes` to the config."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer(models.BPE(ignore_merges=True))
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
    backend.train_from_iterator([CORPUS] * 4, trainer)
    backend.add_special_tokens(SPECIALS)
    bos = ("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]}:1 $B:1", special_tokens=[bos]
            ),
        ]
    )
    backend.enable_truncation(8)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "chat_template": LLAMA31,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 131072,
        **changes,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    stops = [backend.token_to_id(text) for text in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return folder


def talk(*texts: str, system: str | None = None) -> Conversation:
    roles = ["user", "assistant"] * len(texts)
    turns = [Turn(role, text) for role, text in zip(roles, texts, strict=False)]
    first = [] if system is None else [Turn("system", system)]
    return Conversation((*first, *turns), "data.json row 1")


def messages_of(conversation: Conversation) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = []
    for turn in conversation.turns:
        if turn.role == "call":
            calls = [{"type": "function", "function": call} for call in json.loads(turn.text)]
            result.append({"role": "assistant", "tool_calls": calls})
        else:
            result.append({"role": turn.role, "content": turn.text})
    return result


NORMAL = [
    talk("What is it?", "It is a dog."),
    talk("What is it?", "It is a dog.", system="Be a lazy fox."),
    talk("one", "two", "three", "four", "five", "six"),
    talk(
        "caf\u00e9 \u4f60\u597d\u4e16\u754c \U0001f680", "na\u00efve \U0001f1e9\U0001f1ea e\u0301"
    ),
    talk("  spaces before\n", "\n\n and after \t\n", system="  both \n"),
    talk("\n\nlines\n\n\n\nin\r\n between", "1234567890 2023  \n\n x"),
    talk("", "", system=""),
    talk('{"a": [1, 2]} </s> <|not_special|>', "{{ messages }} {% if %} <|eot id|>"),
    Conversation(
        (
            Turn("user", "What date?"),
            Turn("call", '[{"name": "date", "arguments": {"zone": "caf\u00e9 <b>", "n": 1}}]'),
            Turn("tool", '{"date": "26 \u4e16"}'),
            Turn("assistant", "26 Jul"),
        ),
        "x",
    ),
]
