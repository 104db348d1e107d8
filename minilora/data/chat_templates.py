"""Conversations as text: the checkpoint's own chat template, and LLaMA-Factory's llama3."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from os.path import commonprefix
from typing import Any

import jinja2
import jinja2.ext

from minilora.data.conversations import ANSWERS, BadRow, Turn
from minilora.data.template_sandbox import (
    MOST_ADDED,
    MOST_FACTOR,
    REMEDY,
    Generation,
    Sandbox,
    bounded,
)
from minilora.settings.errors import RequestError

# The default date of Llama 3.1's template; later ones ask for today's, and then the same data would
# be other tokens tomorrow.
TODAY = datetime.datetime(2024, 7, 26)


# What LLaMA-Factory writes between the results of tools that were called together
# (data/converter.py).
BETWEEN_RESULTS = "\n</tool_response>\n<tool_response>\n"


@dataclass(frozen=True)
class Llama3:
    """LLaMA-Factory's `llama3` (data/template.py): texts as they are, and no date.

    bos: the text of the token that starts a document. joined: see `tokenizer.encode`; as
    LLaMA-Factory does it, every part is encoded alone.
    """

    bos: str
    joined = False

    def parts(self, turns: Sequence[Turn]) -> list[str]:
        """The text of a conversation, in parts: source, answer, source, answer, ...

        A source is all that stands before an answer. Where no answer follows the last source, it
        is a prompt, and the last part.
        """
        parts: list[str] = []
        source = self.bos
        for turn in _results_joined(turns):
            if turn.role == "system":
                if turn.text:
                    source += self._message("system", turn.text)
            elif turn.role in ANSWERS:
                text = turn.text if turn.role == "assistant" else self._call(turn)
                parts += [source, f"{text}<|eot_id|>"]
                source = ""
            else:
                source += self._message("ipython" if turn.role == "tool" else "user", turn.text)
                source += "<|start_header_id|>assistant<|end_header_id|>\n\n"
        return [*parts, source] if source else parts

    @staticmethod
    def _message(role: str, text: str) -> str:
        """A whole message, with its header."""
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"

    @staticmethod
    def _call(turn: Turn) -> str:
        """Calls of tools as Llama 3.1 writes them: one as an object, several as a list."""
        calls = [
            {"name": call["name"], "parameters": call["arguments"]}
            for call in json.loads(turn.text)
        ]
        text = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
        return turn.before_calls + text


@dataclass(frozen=True)
class OwnTemplate:
    """The checkpoint's chat template, rendered as transformers' apply_chat_template does.

    text: jinja2 source. named: special tokens by name, for the template. joined: see
    `tokenizer.encode`; as transformers does it, the text is encoded as a whole. Raises RequestError
    if `text` is not a template.
    """

    text: str
    named: Mapping[str, str]
    joined = True

    def __post_init__(self) -> None:
        try:
            with bounded():
                _ = self._template  # compiled here, so that a broken template is told at once
        except jinja2.TemplateSyntaxError as error:
            raise RequestError([f"chat template, line {error.lineno}: {error.message}"]) from None
        except (SyntaxError, RecursionError) as error:
            raise RequestError([f"chat template: {error}; {REMEDY}"]) from None

    @cached_property
    def _template(self) -> jinja2.Template:
        """The compiled template, with the extensions, filters and functions of transformers."""
        extensions = [Generation, jinja2.ext.loopcontrols]
        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        # As transformers' filter: jinja2's own would escape <, > and & for HTML.
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = TODAY.strftime
        return environment.from_string(self.text)

    def parts(self, turns: Sequence[Turn]) -> list[str]:
        """The text of a conversation, in parts as of `Llama3.parts`.

        Put together they are what the template writes of the whole conversation. Raises BadRow for
        turns that the template refuses, RequestError for a template that writes earlier turns
        otherwise once later ones come, except that it may leave out what an answer thought.
        """
        # A template does not say where an answer starts and ends. It is found by rendering what
        # comes before the answer, as a prompt, and then the same with the answer.
        messages = [_message(turn) for turn in turns]
        pairs: list[tuple[str, str]] = []  # source and answer, as written while it was the last
        parts: list[str] = []
        for index, turn in enumerate(turns):
            if turn.role not in ANSWERS:
                continue
            before = self._render(messages[:index], add_generation_prompt=True)
            source = _cut(before, pairs)[-1]
            with_answer = self._render(messages[: index + 1], add_generation_prompt=False)
            *earlier, rest = _cut(with_answer, pairs)
            if not pairs and not rest.startswith(source):
                self._check_opening(messages[:index], source, rest)
            answer = _rest(rest, source)
            pairs.append((source, answer))
            parts = [*earlier, source, answer]

        if turns[-1].role not in ANSWERS:
            parts = _cut(self._render(messages, add_generation_prompt=True), pairs)
        return parts

    def whole(self, turns: Sequence[Turn], prompt: bool) -> str:
        """The text of a conversation in one piece; as a prompt, with what begins an answer.

        Raises BadRow for turns that the template refuses.
        """
        return self._render([_message(turn) for turn in turns], add_generation_prompt=prompt)

    def _check_opening(self, messages: list[dict[str, Any]], before: str, done: str) -> None:
        """Name a template that opens answers with words that it leaves out of finished ones.

        messages: those before an answer. before: their text, as a prompt. done: with the answer.
        DeepSeek's R1 models have such a template: a prompt ends with "<think>". Raises
        RequestError.
        """
        shared = len(commonprefix([before, done]))
        if shared >= len(self._render(messages, add_generation_prompt=False)):
            raise RequestError(
                [
                    f"chat template: it opens an answer with {before[shared:]!r} when it asks for "
                    "one, and leaves that out of an answer that is there, so the model would be "
                    "trained on other text than it is asked with; put a chat_template.jinja "
                    "beside the weights that writes both alike"
                ]
            )

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """The text of these messages. Raises BadRow, or RequestError past one of the limits."""
        limit = MOST_ADDED + MOST_FACTOR * len(str(messages))
        pieces: list[str] = []
        length = 0

        # Piece by piece, so that a template that writes without end is stopped.
        try:
            with bounded():
                for piece in self._template.generate(
                    messages=messages,
                    tools=None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self.named,
                ):
                    pieces.append(piece)
                    length += len(piece)
                    if length > limit:
                        raise RequestError(
                            [f"chat template: writes more than {limit} characters; {REMEDY}"]
                        )
        except RequestError:
            raise
        except Exception as error:  # a template's code can raise anything
            raise BadRow(f"the chat template refuses it: {error}") from None
        return "".join(pieces)


def _results_joined(turns: Sequence[Turn]) -> Iterator[Turn]:
    """The turns, with results of tools that follow each other made one, as in LLaMA-Factory."""
    for is_tool, group in groupby(turns, key=lambda turn: turn.role == "tool"):
        if is_tool:
            yield Turn("tool", BETWEEN_RESULTS.join(turn.text for turn in group))
        else:
            yield from group


def _message(turn: Turn) -> dict[str, Any]:
    """A turn in the form that chat templates expect."""
    if turn.role == "call":
        calls = [{"type": "function", "function": call} for call in json.loads(turn.text)]
        said = {"content": turn.before_calls} if turn.before_calls else {}
        return {"role": "assistant", **said, "tool_calls": calls}
    return {"role": turn.role, "content": turn.text}


def _cut(text: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """A rendered conversation as source, answer, source, answer, ..., and the rest.

    pairs: its earlier sources and answers, each answer as it was written while it was the last
    turn. Qwen3's template leaves the text up to </think> out of answers that are no longer the
    last, so an answer is looked for as it was, and without that text. Raises RequestError.
    """
    parts: list[str] = []
    at = 0
    for source, answer in pairs:
        if not text.startswith(source, at):
            raise _written_otherwise()
        at += len(source)
        without_thoughts = answer.rpartition("</think>")[2].lstrip("\n")
        for written in (answer, without_thoughts):
            if text.startswith(written, at):
                break
        else:
            raise _written_otherwise()
        at += len(written)
        parts += [source, written]
    return [*parts, text[at:]]


def _rest(text: str, start: str) -> str:
    """The rest of a text that begins with `start`. Raises RequestError if it does not."""
    if not text.startswith(start):
        raise _written_otherwise()
    return text[len(start) :]


def _written_otherwise() -> RequestError:
    return RequestError(
        [
            "chat template: it writes a turn differently once more turns follow, so the model "
            f"would be trained on other text than it is asked with; {REMEDY}"
        ]
    )


def _raise_exception(message: str) -> None:
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(message)
