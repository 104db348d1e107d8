"""Conversations as text: the checkpoint's own chat template, and LLaMA-Factory's llama3."""

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
# A template may add this much to a conversation, and at most this factor: JSON escapes are 6 long.
MOST_ADDED = 1_000_000
MOST_FACTOR = 8
OTHER = "use template: llama3, or another template"
MOST_SECONDS = 3  # of processor time for one conversation; what is usual takes a thousandth


@dataclass(frozen=True)
class Llama3:
    """LLaMA-Factory's `llama3` (data/template.py): texts as they are, and no date."""

    bos: str
    joined = False  # every part is encoded alone

    def parts(self, turns: Sequence[Turn]) -> list[str]:
        """The text, cut into source, answer, source, answer, ...; a last source is a prompt."""
        parts, source = [], self.bos
        for turn in turns:
            if turn.role == "system":
                source += self._message("system", turn.text) if turn.text else ""
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
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"

    @staticmethod
    def _call(text: str) -> str:
        calls = [
            {"name": call["name"], "parameters": call["arguments"]} for call in json.loads(text)
        ]
        return json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)


class _Sandbox(ImmutableSandboxedEnvironment):
    """No code but the template's, and no operation that is one endless call by itself."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiply what stays small; no chat template needs powers."""
        pairs = (left, right), (right, left)
        lengths = [len(x) * y for x, y in pairs if hasattr(x, "__len__") and isinstance(y, int)]
        bits = [x.bit_length() for x in (left, right) if isinstance(x, int)]
        if operator == "**" or max(lengths, default=0) > MOST_ADDED or max(bits, default=0) > 1000:
            raise jinja2.exceptions.SecurityError(f"{operator} of such values is not allowed")
        return super().call_binop(context, operator, left, right)


@contextmanager
def _bounded() -> Iterator[None]:
    """Raises RequestError if a template takes too long, or more memory than there is."""

    def stop(*_: object) -> NoReturn:
        raise RequestError([f"chat template: still busy after {MOST_SECONDS} s; {OTHER}"])

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)
    try:
        yield
    except MemoryError:
        raise RequestError([f"chat template: needs more memory than there is; {OTHER}"]) from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks answers for other programs; here its contents stand as they are."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@dataclass(frozen=True)
class OwnTemplate:
    """The checkpoint's chat template, rendered as transformers' apply_chat_template does.

    text: jinja2 source. named: special tokens by name, for the template. Raises RequestError if
    `text` is not a template.
    """

    text: str
    named: Mapping[str, str]
    joined = True  # the text is encoded as a whole

    def __post_init__(self) -> None:
        try:
            with _bounded():
                _ = self._template
        except jinja2.TemplateSyntaxError as error:
            raise RequestError([f"chat template, line {error.lineno}: {error.message}"]) from None
        except (SyntaxError, RecursionError) as error:
            raise RequestError([f"chat template: {error}; {OTHER}"]) from None

    @cached_property
    def _template(self) -> jinja2.Template:
        extensions = [_Generation, jinja2.ext.loopcontrols]
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        # As transformers' filter: jinja2's own would escape <, > and & for HTML.
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = TODAY.strftime
        return environment.from_string(self.text)

    def parts(self, turns: Sequence[Turn]) -> list[str]:
        """See `Llama3.parts`. Answers are found by rendering with and without each of them.

        Raises BadRow for turns that the template refuses, RequestError for a template that shows
        earlier turns otherwise once later ones come.
        """
        messages = [_message(turn) for turn in turns]
        parts, done = [], ""
        for index, turn in enumerate(turns):
            if turn.role in ANSWERS:
                for text in (
                    self._render(messages[:index], add_generation_prompt=True),
                    self._render(messages[: index + 1], add_generation_prompt=False),
                ):
                    parts.append(_after(done, text))
                    done = text
        if turns[-1].role not in ANSWERS:
            parts.append(_after(done, self._render(messages, add_generation_prompt=True)))
        return parts

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        limit = MOST_ADDED + MOST_FACTOR * len(str(messages))
        pieces, length = [], 0
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
                        raise RequestError([f"chat template: writes over {limit} characters"])
        except RequestError:
            raise
        except Exception as error:  # a template's code can raise anything
            raise BadRow(f"the chat template refuses it: {error}") from None
        return "".join(pieces)


def _message(turn: Turn) -> dict[str, Any]:
    if turn.role == "call":
        calls = [{"type": "function", "function": call} for call in json.loads(turn.text)]
        return {"role": "assistant", "tool_calls": calls}
    return {"role": turn.role, "content": turn.text}


def _after(start: str, text: str) -> str:
    """The rest of a text that begins with `start`."""
    if not text.startswith(start):
        raise RequestError(
            [
                "chat template: it shows a turn differently once more turns follow, so what is"
                f" trained is not what will be served; {OTHER}"
            ]
        )
    return text[len(start) :]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
