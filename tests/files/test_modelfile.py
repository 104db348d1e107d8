"""Ollama's Modelfile: the templates that can be derived, and what is said of those that cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from minilora.data.chat import make_template
from minilora.data.conversations import Turn
from minilora.data.tokenizer import Tokenizer, load_tokenizer
from minilora.files.modelfile import go_template, modelfile

# Of Qwen2.5: with a system message of its own.
CHATML = """
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are kind.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

# As Qwen3 does it: the last answer has an empty thought before it, earlier ones have none.
THINKING = CHATML.replace(
    "message.role + '\n' + message.content",
    "message.role + '\n' + ('<think>\n\n</think>\n\n' if loop.last and message.role == 'assistant' "
    "else '') + message.content",
)

IN_GO = """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ else }}<|im_start|>system
You are kind.<|im_end|>
{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
<|im_start|>assistant
{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>
{{ end }}{{ end }}"""

LLAMA3 = '''FROM .
TEMPLATE """{{ if .System }}<|start_header_id|>system<|end_header_id|>

{{ .System }}<|eot_id|>{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}<|start_header_id|>\
user<|end_header_id|>

{{ .Content }}<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{{ else if eq .Role "assistant" }}{{ .Content }}<|eot_id|>{{ end }}{{ end }}"""
PARAMETER stop "<|end_of_text|>"
PARAMETER stop "<|eom_id|>"
PARAMETER stop "<|eot_id|>"
'''


@pytest.fixture
def tokenizer(tiny: Path) -> Tokenizer:
    return load_tokenizer(tiny)


def with_template(tokenizer: Tokenizer, text: str) -> Tokenizer:
    return replace(tokenizer, chat_template=text)


def test_the_template_llama3(tokenizer: Tokenizer) -> None:
    assert modelfile(tokenizer, make_template("llama3", tokenizer)) == (LLAMA3, [])


def test_the_own_template_of_llama_31_has_its_date_and_no_bos(tokenizer: Tokenizer) -> None:
    found = str(go_template(make_template(None, tokenizer)))
    header = "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    date = "Today Date: 26 Jul 2024\n\n"
    assert found.startswith(
        f"{{{{ if .System }}}}{header}{date}{{{{ .System }}}}<|eot_id|>"
        f"{{{{ else }}}}{header}{date}<|eot_id|>{{{{ end }}}}"
    )
    assert "begin_of_text" not in found


@pytest.mark.parametrize("text", [CHATML, THINKING], ids=["chatml", "thinking"])
def test_chatml_with_a_system_message_of_its_own(tokenizer: Tokenizer, text: str) -> None:
    assert str(go_template(make_template(None, with_template(tokenizer, text)))) == IN_GO


def test_a_longer_conversation_is_the_checkpoints_too(tokenizer: Tokenizer) -> None:
    own = make_template(None, with_template(tokenizer, CHATML))
    turns = [Turn("system", "s")]
    for number in range(3):
        turns += [Turn("user", f"q {number}"), Turn("assistant", f"a {number}")]
    derived = go_template(own)
    assert derived is not None
    assert derived.rendered(turns[:-1]) == "".join(own.renderer.parts(turns[:-1]))


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages | length }}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        # A system message that becomes a part of the first question.
        "{% for m in messages %}{% if m.role == 'system' %}[{{ m.content }}] {% elif m.role == "
        "'user' %}Q{{ m.content }}A{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if messages[0].role == 'system' %}!{% endif %}",
        "{% for m in messages %}{{ '{{' + m.content }}{% endfor %}",
        "{{ raise_exception('never') }}",
    ],
)
def test_what_cannot_be_derived_is_left_to_the_user(tokenizer: Tokenizer, text: str) -> None:
    other = with_template(tokenizer, text)
    written, left = modelfile(other, make_template(None, other))
    assert "TEMPLATE" not in written and written.startswith("FROM .\nPARAMETER stop ")
    assert len(left) == 1 and "add TEMPLATE" in left[0]
    assert modelfile(tokenizer, None) == (written, left)
