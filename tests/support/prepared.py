"""Tokenised documents: as a run would make them, and made up."""

from __future__ import annotations

import numpy as np

from minilora.data.documents import Documents
from minilora.data.prepare import Prepared, prepare
from minilora.files.model_config import read_model_config
from minilora.settings.settings import Settings


def prepared_of(settings: Settings) -> Prepared:
    """Tokenise the datasets of these settings with the shape of their base model."""
    return prepare(settings, read_model_config(settings.base).shape, colour=False)


def some_documents(count: int, seed: int, longest: int = 50) -> Documents:
    """Documents of random lengths up to `longest`, tokens and masks."""
    rng = np.random.default_rng(seed)
    return Documents.of(
        [
            (rng.integers(0, 1000, n).astype(np.int32), rng.random(n) < 0.4)
            for n in rng.integers(1, longest + 1, count)
        ]
    )
