"""LLaMA-Factory's chat templates by name (data/template.py), apart from llama3: Qwen's, Mistral's.

As LLaMA-Factory does it, texts are written as they are, and every text that a part is made of is
encoded alone. What it writes of the descriptions of tools is not written here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from minilora.data.chat_templates import Llama3
from minilora.data.conversations import ANSWERS, Turn
from minilora.data.tokenizer import Part

NO_THOUGHTS = "<think>\n\n</think>\n\n"


class Renderer(Protocol):
    """Writes conversations as text. joined: see `tokenizer.encode`."""

    @property
    def joined(self) -> bool: ...

    def parts(self, turns: Sequence[Turn]) -> Sequence[Part]:
        """The text of a conversation, in parts: source, answer, source, answer, ..."""
        ...


@dataclass(frozen=True)
class ChatMl:
    """LLaMA-Factory's `qwen`, and with `thinks` its `qwen3`.

    thinks: whether an answer without <think> gets an empty pair of these tags, which is trained.
    Thoughts stay in earlier answers, unlike in Qwen3's own template.
    """

    thinks: bool
    joined = False

    def parts(self, turns: Sequence[Turn]) -> list[Part]:
        """See `Renderer`."""
        parts: list[Part] = []
        source = ""
        for turn in turns:
            if turn.role == "system":
                if turn.text:
                    source += f"<|im_start|>system\n{turn.text}<|im_end|>\n"
            elif turn.role in ANSWERS:
                text = turn.text if turn.role == "assistant" else _tool_calls(turn.text)
                answer = f"{text}<|im_end|>\n"
                has_thoughts = "<think>" in turn.text or "</think>" in turn.text
                parts.append(source)
                parts.append((NO_THOUGHTS, answer) if self.thinks and not has_thoughts else answer)
                source = ""
            else:
                text = turn.text
                if turn.role == "tool":
                    text = f"<tool_response>\n{text}\n</tool_response>"
                source += f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        return [*parts, source] if source else parts


def _tool_calls(text: str) -> str:
    """Calls of tools as Qwen2.5 writes them."""
    return "\n".join(
        f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
        for call in json.loads(text)
    )


@dataclass(frozen=True)
class MistralV3:
    """LLaMA-Factory's `mistral`: the system message is the beginning of the first question.

    bos, eos: the texts of the tokens that start a document and end an answer.
    """

    bos: str
    eos: str
    joined = False

    def parts(self, turns: Sequence[Turn]) -> list[Part]:
        """See `Renderer`."""
        parts: list[Part] = []
        source: tuple[str, ...] = (self.bos,)
        system = ""
        for turn in turns:
            if turn.role == "system":
                system = f"{turn.text}\n\n" if turn.text else ""
            elif turn.role in ANSWERS:
                text = turn.text if turn.role == "assistant" else f"[TOOL_CALLS] {turn.text}"
                start = " " if turn.role == "assistant" else ""
                parts += [source, (f"{start}{text}", self.eos)]
                source = ()
            elif turn.role == "tool":
                source += (f'[TOOL_RESULTS] {{"content": {turn.text}}}[/TOOL_RESULTS]',)
            else:
                source += (f"[INST] {system}{turn.text}[/INST]",)
                system = ""
        return [*parts, source] if source else parts


@dataclass(frozen=True)
class Named:
    """A template by name. tokens: special tokens that it needs. stops: those that end an answer.

    renderer: makes it of the tokenizer's special tokens by name. default_system: the system message
    of conversations without one, unless the settings have another.
    """

    renderer: Callable[[Mapping[str, str]], Renderer]
    tokens: tuple[str, ...]
    stops: tuple[str, ...] = ()
    needs_bos: bool = True
    default_system: str | None = None


def _chat_ml(thinks: bool, default_system: str | None = None) -> Named:
    tokens = ("<|im_start|>", "<|im_end|>")
    return Named(lambda _: ChatMl(thinks), tokens, tokens[1:], False, default_system)


NAMED = {
    "llama3": Named(
        lambda named: Llama3(named["bos_token"]),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("<|eot_id|>", "<|eom_id|>"),
    ),
    "qwen": _chat_ml(False, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": _chat_ml(True),
    "qwen3_nothink": _chat_ml(False),
    "mistral": Named(
        lambda named: MistralV3(named["bos_token"], named["eos_token"]), ("[INST]", "[/INST]")
    ),
}
