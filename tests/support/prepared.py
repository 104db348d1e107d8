"""Tokenised documents of a request, as a run would make them."""

from __future__ import annotations

from minilora.data.prepare import Prepared, prepare
from minilora.files.model_config import read_model_config
from minilora.settings.settings import Settings


def prepared_of(settings: Settings) -> Prepared:
    """Tokenise the datasets of these settings with the shape of their base model."""
    return prepare(settings, read_model_config(settings.base).shape, colour=False)
