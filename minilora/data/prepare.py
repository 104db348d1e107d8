"""From the settings to tokenised documents: read, render, tokenise, count what was dropped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minilora.config import Settings
from minilora.data.batches import Documents
from minilora.data.chat import encode_texts, make_template, show
from minilora.data.records import read_conversations
from minilora.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Prepared:
    """Documents, a line that says what was used and dropped, and the first one to look at."""

    documents: Documents
    summary: str
    sample: str


def prepare(settings: Settings, colour: bool) -> Prepared:
    """Read and tokenise the datasets of a run.

    colour: mark the trained part of the sample in green. Raises RequestError.
    """
    assert settings.model.model_name_or_path
    data, stage = settings.data, settings.method.stage
    tokenizer = load_tokenizer(Path(settings.model.model_name_or_path))
    conversations, tally = read_conversations(data.dataset, data, stage)
    if stage == "pt":
        encoded = encode_texts(tokenizer, conversations, data.cutoff_len)
    else:
        template = make_template(data.template, tokenizer, data.default_system)
        encoded, later = template.encode(
            conversations,
            cutoff_len=data.cutoff_len,
            train_on_prompt=data.train_on_prompt,
            mask_history=data.mask_history,
        )
        tally = tally.then(later)
    documents = Documents.of(encoded)
    summary = (
        f"{tally.summary()}; {len(documents)} documents, {len(documents.tokens):,} tokens, "
        f"{int(documents.labelled.sum()):,} of them trained"
    )
    return Prepared(documents, summary, show(tokenizer, encoded[0], colour))
