"""Whether a chat template wrote all that a conversation says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from minilora.data.conversations import ANSWERS, BadRow, Turn
from minilora.data.tokenizer import Rendered


def check_nothing_lost(turns: Sequence[Turn], rendered: Rendered) -> None:
    """Raises BadRow if the template left out the text of a turn.

    A template may change white space, and write a text as JSON. Templates that know no calls write
    such an answer as an empty one, and some leave out what an answer says before "</think>".
    """
    index = 0
    for turn in turns:
        is_answer = turn.role in ANSWERS
        part = "".join(rendered.parts[index + is_answer])
        if rendered.mark:
            part = part.replace(rendered.mark, "")
        squeezed = _squeezed(part)
        texts = list(_texts_of(turn))
        if is_answer and turn is not turns[-1]:
            # Qwen3 writes earlier answers without what they thought; only the last one keeps it.
            texts = [text.rpartition("</think>")[2] for text in texts]
        if not all(text in part or _stands_in(text, squeezed) for text in texts):
            what = "an answer" if is_answer else f"a {turn.role} message"
            raise BadRow(f"the template leaves out text of {what}")
        index += 2 * is_answer


def _texts_of(turn: Turn) -> Iterator[str]:
    """What must stand in the text of a turn. Of calls: their names, and arguments that are text."""
    if turn.role != "call":
        yield turn.text
        return
    yield turn.before_calls
    for call in json.loads(turn.text):
        yield call["name"]
        yield from call["arguments"]
        yield from (value for value in call["arguments"].values() if isinstance(value, str))


def _stands_in(text: str, squeezed: str) -> bool:
    """Whether a text stands in another one without white space, as it is or as JSON writes it."""
    forms = (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])
    return any(_squeezed(form) in squeezed for form in forms)


def _squeezed(text: str) -> str:
    """The text without its white space."""
    return "".join(text.split())
