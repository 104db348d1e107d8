"""Where chat templates of strangers are rendered: no access to the program, and bounds."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minilora.settings.errors import RequestError

# A template is a program that came with the checkpoint, so its time and its output have limits.
MOST_ADDED = 1_000_000  # characters that a template may add to a conversation
MOST_FACTOR = 8  # it may make a text this much longer: a JSON escape of one character has six
MOST_SECONDS = 3  # of processor time for one conversation; what is usual takes a thousandth
MOST_BITS = 1000  # of a number that a template multiplies
REMEDY = "use template: llama3, or another template"


class Sandbox(ImmutableSandboxedEnvironment):
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


class Generation(jinja2.ext.Extension):
    """{% generation %} marks answers for other programs; here its contents stand as they are."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@contextmanager
def bounded() -> Iterator[None]:
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
