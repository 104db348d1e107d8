"""The chat template of a request whose settings are wrong, so that all is said in one round."""

from __future__ import annotations

from pathlib import Path

from minilora.data.chat import make_template
from minilora.data.tokenizer import load_tokenizer
from minilora.settings.errors import RequestError


def template_problems(model: str, template: str | None) -> list[str]:
    """What is wrong with the tokenizer and the template of a model; nothing if it has no folder.

    template: a name that is known, or None for the checkpoint's own.
    """
    folder = Path(model)
    if not folder.is_dir():
        return []  # told once everything else is right, with what to do about it
    try:
        make_template(template, load_tokenizer(folder))
    except RequestError as error:
        return list(error.problems)
    except OSError as error:
        return [f"{error.filename}: {error.strerror}"]
    return []
