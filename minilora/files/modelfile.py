"""Ollama's Modelfile for a merged model: its chat template in Go's syntax, and its stop tokens.

The Go template is derived from the chat template that the model was trained with: conversations
with marked texts are rendered, and what stands around the marks becomes the Go template. It is
written only if it then gives, for several conversations, exactly what the chat template gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minilora.data.chat import Template
from minilora.data.chat_templates import OwnTemplate
from minilora.data.conversations import BadRow, Turn
from minilora.data.named_templates import Renderer
from minilora.data.tokenizer import Tokenizer
from minilora.settings.errors import RequestError

# Texts that no template has, in which nothing is to be trimmed, split or escaped.
SYSTEM, QUESTION, ANSWER, SECOND = "Xsystem", "Xquestion", "Xanswer", "Xsecond"
ASKED = (Turn("user", QUESTION),)
ANSWERED = (*ASKED, Turn("assistant", ANSWER))
ASKED_AGAIN = (*ANSWERED, Turn("user", SECOND))
PROMPTS: tuple[tuple[Turn, ...], ...] = (
    ASKED,
    (Turn("system", SYSTEM), *ASKED),
    ASKED_AGAIN,
    (Turn("system", SYSTEM), *ASKED_AGAIN),
)


@dataclass(frozen=True)
class GoTemplate:
    """A chat template that writes one piece of text before and after each message.

    system, question, answer: what stands before and after such a message; what follows a question
    up to the answer belongs to the question. no_system: what is written in place of a system
    message where there is none.
    """

    system: tuple[str, str]
    no_system: str
    question: tuple[str, str]
    answer: tuple[str, str]

    def rendered(self, turns: Sequence[Turn]) -> str:
        """The text of a conversation that starts with at most one system message."""
        around = {"system": self.system, "user": self.question, "assistant": self.answer}
        text = "" if turns[0].role == "system" else self.no_system
        for turn in turns:
            before, after = around[turn.role]
            text += before + turn.text + after
        return text

    def __str__(self) -> str:
        """In Go's syntax. Without a dash inside the braces, all text stands as it is written."""
        system = f"{self.system[0]}{{{{ .System }}}}{self.system[1]}"
        question = f"{self.question[0]}{{{{ .Content }}}}{self.question[1]}"
        answer = f"{self.answer[0]}{{{{ .Content }}}}{self.answer[1]}"
        otherwise = f"{{{{ else }}}}{self.no_system}" if self.no_system else ""
        return (
            f"{{{{ if .System }}}}{system}{otherwise}{{{{ end }}}}"
            f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{question}'
            f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}{{{{ end }}}}'
        )


def modelfile(tokenizer: Tokenizer, template: Template | None) -> tuple[str, list[str]]:
    """The text of the Modelfile, and lines for the user on what it leaves to them.

    template: what the model was trained with, None where there is none.
    """
    lines = ["FROM ."]
    left = []
    derived = None if template is None else go_template(template)
    if derived is None:
        left.append(
            "no chat template was found that can be written as Ollama's: add TEMPLATE to the "
            "Modelfile, or Ollama sends texts as they are"
        )
    else:
        lines.append(f'TEMPLATE """{derived}"""')
    for stop in tokenizer.stop_ids if template is None else template.stop_ids:
        text = tokenizer.backend.id_to_token(stop)
        if text is not None:
            lines.append(f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}")
    return "\n".join(lines) + "\n", left


def go_template(template: Template) -> GoTemplate | None:
    """The same as Ollama writes it, None where that cannot be derived.

    The token that starts a document is left out, because Ollama puts it there itself.
    """
    renderer = template.renderer
    bos = template.tokenizer.named.get("bos_token", "")
    try:
        texts = {turns: _text(renderer, turns, prompt=True) for turns in PROMPTS}
        texts = {turns: text.removeprefix(bos) for turns, text in texts.items()}
        _, answer_end = _around(_text(renderer, ANSWERED, prompt=False), ANSWER)
        derived = _derived(texts, answer_end)
    except (BadRow, RequestError, ValueError):
        return None
    is_right = all(derived.rendered(turns) == text for turns, text in texts.items())
    # Go would read these as its own syntax, and Ollama as the end of the template.
    is_plain = not any(sign in text for sign in ("{{", '"""') for text in texts.values())
    return derived if is_right and is_plain else None


def _text(renderer: Renderer, turns: Sequence[Turn], prompt: bool) -> str:
    """A conversation in one piece. A template of our own writes earlier turns as it writes them
    last, so its parts are the whole; a checkpoint's need not."""
    if isinstance(renderer, OwnTemplate):
        return renderer.whole(turns, prompt)
    return "".join("".join(part) for part in renderer.parts(turns))


def _derived(texts: Mapping[tuple[Turn, ...], str], answer_end: str) -> GoTemplate:
    """What stands around the marks. Raises ValueError where one is missing, or comes twice."""
    alone, with_system, twice = (texts[turns] for turns in PROMPTS[:3])
    before_question, after_question = _around(alone, QUESTION)
    system_start, rest = _around(with_system, SYSTEM)
    system_end, _ = _around(rest, QUESTION)
    _, after_answer = _around(twice, ANSWER)
    before_second, _ = _around(after_answer, SECOND)

    question_start = before_second.removeprefix(answer_end)
    return GoTemplate(
        system=(system_start, system_end.removesuffix(question_start)),
        no_system=before_question.removesuffix(question_start),
        question=(question_start, after_question),
        answer=("", answer_end),
    )


def _around(text: str, mark: str) -> tuple[str, str]:
    """What stands before and after the mark, which must occur once. Raises ValueError."""
    before, after = text.split(mark)
    return before, after
