"""Conversations as text: the checkpoint's own chat template, and LLaMA-Factory's llama3."""

from __future__ import annotations

import datetime
import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minilora.data.conversations import ANSWERS, BadRow, Turn
from minilora.settings.errors import RequestError

# The default date of Llama 3.1's template; later ones ask for today's, and then the same data would
# be other tokens tomorrow.
TODAY = datetime.datetime(2024, 7, 26)

# A template is a program that came with the checkpoint, so its time and its output have limits.
MOST_SECONDS = 3  # of processor time for one conversation; what is usual takes a thousandth
MOST_ADDED = 1_000_000  # characters that a template may add to a conversation
MOST_FACTOR = 8  # it may make a text this much longer: a JSON escape of one character has six
MOST_BITS = 1000  # of a number that a template multiplies

REMEDY = "use template: llama3, or another template"


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
        for turn in turns:
            if turn.role == "system":
                if turn.text:
                    source += self._message("system", turn.text)
            elif turn.role in ANSWERS:
                text = turn.text if turn.role == "assistant" else self._call(turn.text)
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
    def _call(text: str) -> str:
        """Calls of tools as Llama 3.1 writes them: one as an object, several as a list."""
        calls = [
            {"name": call["name"], "parameters": call["arguments"]} for call in json.loads(text)
        ]
        return json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)


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
            with _bounded():
                _ = self._template  # compiled here, so that a broken template is told at once
        except jinja2.TemplateSyntaxError as error:
            raise RequestError([f"chat template, line {error.lineno}: {error.message}"]) from None
        except (SyntaxError, RecursionError) as error:
            raise RequestError([f"chat template: {error}; {REMEDY}"]) from None

    @cached_property
    def _template(self) -> jinja2.Template:
        """The compiled template, with the extensions, filters and functions of transformers."""
        extensions = [_Generation, jinja2.ext.loopcontrols]
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        # As transformers' filter: jinja2's own would escape <, > and & for HTML.
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = TODAY.strftime
        return environment.from_string(self.text)

    def parts(self, turns: Sequence[Turn]) -> list[str]:
        """The text of a conversation, in parts as of `Llama3.parts`.

        Raises BadRow for turns that the template refuses, RequestError for a template that writes
        earlier turns otherwise once later ones come.
        """
        # A template does not say where an answer starts and ends. It is found by rendering what
        # comes before the answer, as a prompt, and then the same with the answer.
        messages = [_message(turn) for turn in turns]
        parts: list[str] = []
        done = ""
        for index, turn in enumerate(turns):
            if turn.role not in ANSWERS:
                continue
            before = self._render(messages[:index], add_generation_prompt=True)
            parts.append(_rest(before, done))
            done = self._render(messages[: index + 1], add_generation_prompt=False)
            parts.append(_rest(done, before))

        if turns[-1].role not in ANSWERS:
            prompt = self._render(messages, add_generation_prompt=True)
            parts.append(_rest(prompt, done))
        return parts

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """The text of these messages. Raises BadRow, or RequestError past one of the limits."""
        limit = MOST_ADDED + MOST_FACTOR * len(str(messages))
        pieces: list[str] = []
        length = 0

        # Piece by piece, so that a template that writes without end is stopped.
        try:
            with _bounded():
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


class _Sandbox(ImmutableSandboxedEnvironment):
    """Runs no code but the template's, and no operation that is one endless call by itself.

    Such a call could not be stopped: Python handles a signal only between two of its operations.
    """

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiply what stays small. Powers are refused: no chat template needs them."""
        if operator == "**" or not (_stays_small(left, right) and _stays_small(right, left)):
            raise jinja2.exceptions.SecurityError(f"{operator} of such values is not allowed")
        return super().call_binop(context, operator, left, right)


def _stays_small(value: Any, factor: Any) -> bool:
    """Whether a number is small, or a text or list still is after so many repetitions."""
    if isinstance(value, int):
        return value.bit_length() <= MOST_BITS
    if hasattr(value, "__len__") and isinstance(factor, int):
        return len(value) * factor <= MOST_ADDED
    return True


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks answers for other programs; here its contents stand as they are."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@contextmanager
def _bounded() -> Iterator[None]:
    """Raises RequestError if a template takes too long, or more memory than there is."""

    def stop(*_: object) -> NoReturn:
        raise RequestError([f"chat template: still busy after {MOST_SECONDS} s; {REMEDY}"])

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)
    try:
        yield
    except MemoryError:
        raise RequestError([f"chat template: needs more memory than there is; {REMEDY}"]) from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _message(turn: Turn) -> dict[str, Any]:
    """A turn in the form that chat templates expect."""
    if turn.role == "call":
        calls = [{"type": "function", "function": call} for call in json.loads(turn.text)]
        return {"role": "assistant", "tool_calls": calls}
    return {"role": turn.role, "content": turn.text}


def _rest(text: str, start: str) -> str:
    """The rest of a text that begins with `start`. Raises RequestError if it does not."""
    if not text.startswith(start):
        raise RequestError(
            [
                "chat template: it writes a turn differently once more turns follow, so the model "
                f"would be trained on other text than it is asked with; {REMEDY}"
            ]
        )
    return text[len(start) :]


def _raise_exception(message: str) -> None:
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(message)
