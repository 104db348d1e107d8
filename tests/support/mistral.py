"""Mistral's tokenizer in small, in both forms of its files, and a chat template like its own.

The template is written for these tests: like that of Mistral-7B-Instruct-v0.3, with the system
message in the first question, where the published one puts it into the last.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.support.llama31 import CORPUS

SPECIALS = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
FORMS = ("first", "legacy")
MISTRAL = r"""
{%- set system = "" %}
{%- if messages[0].role == "system" %}
    {%- set system = messages[0].content ~ "\n\n" %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- "[INST] " ~ (system if loop.first else "") ~ message.content ~ "[/INST]" }}
    {%- elif message.tool_calls is defined %}
        {{- "[TOOL_CALLS] " ~ message.tool_calls | map(attribute="function") | list | tojson }}
        {{- eos_token }}
    {%- elif message.role == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' ~ message.content ~ "}[/TOOL_RESULTS]" }}
    {%- else %}{{ " " ~ message.content | trim ~ eos_token }}{% endif %}
{%- endfor %}
"""


def write_mistral(folder: Path, form: str) -> Path:
    """A checkpoint's tokenizer files: byte pairs over text whose spaces are U+2581.

    form: "first" writes such a character before the first word of a text alone, "legacy" before
    the first word after every special token too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    space = "\u2581"
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if form == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(space, "first", split=False)
    else:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(space), normalizers.Replace(" ", space)]
        )
    steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    bytes_of_text = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*SPECIALS, *bytes_of_text],
        show_progress=False,
        max_token_length=8,
    )
    words = [word + " " for word in CORPUS.split()]
    backend.train_from_iterator([*words, CORPUS], trainer)
    written = json.loads(backend.to_str())
    # Bytes are tokens of the vocabulary, but no text becomes one by its spelling.
    written["added_tokens"] = []
    backend = Tokenizer.from_str(json.dumps(written))
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": MISTRAL,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
