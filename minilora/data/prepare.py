"""From the settings to tokenised documents: read, render, tokenise, count what was dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from minilora.data.chat import encode_texts, make_template, show
from minilora.data.datasets import Tally, read_conversations
from minilora.data.documents import Documents, Encoded
from minilora.data.schedule import permutation
from minilora.data.tokenizer import Tokenizer, load_tokenizer
from minilora.model.llama_shape import LlamaShape
from minilora.settings.errors import RequestError
from minilora.settings.settings import Settings

HOLD_OUT = 0x7E57  # seeds the choice of validation documents, so that it is no epoch's order


@dataclass(frozen=True)
class Prepared:
    """Documents to train on and to validate with.

    summary: what was used and what was dropped, in words. sample: the text of the first document,
    its trained part marked (see `show`). tokenizer: that of the base model, to show others.
    """

    documents: Documents
    validation: Documents
    summary: str
    sample: str
    tokenizer: Tokenizer


def prepare(settings: Settings, shape: LlamaShape, colour: bool) -> Prepared:
    """Read and tokenise the datasets of a run.

    shape: of the base model, to compare with. colour: mark the trained part of the sample in
    green. Raises RequestError.
    """
    data = settings.data
    tokenizer = load_tokenizer(settings.base)
    encoded, tally = _read_and_encode(settings, data.dataset, tokenizer)

    # Documents to validate with are datasets of their own, or are taken from those to train on.
    held_out: list[Encoded] = []
    held_out_tally: Tally | None = None
    if data.eval_dataset:
        held_out, held_out_tally = _read_and_encode(settings, data.eval_dataset, tokenizer)
    elif data.val_size:
        encoded, held_out = _hold_out(encoded, data.val_size, settings.train.seed)
    documents, validation = Documents.of(encoded), Documents.of(held_out)
    _check_vocabulary(documents, validation, shape, settings.base)

    summary = (
        f"{tally.summary()}; {len(documents)} documents, {len(documents.tokens):,} tokens, "
        f"{int(documents.labelled.sum()):,} of them trained"
    )
    if held_out:
        summary += f"; {len(validation)} documents to validate with"
    if held_out_tally is not None:
        summary += f" ({held_out_tally.summary()})"
    summary += _length_warning(documents, validation, shape)
    sample = show(tokenizer, encoded[0], colour)
    return Prepared(documents, validation, summary, sample, tokenizer)


def _read_and_encode(
    settings: Settings, names: tuple[str, ...], tokenizer: Tokenizer
) -> tuple[list[Encoded], Tally]:
    """The documents of the named datasets, and how many rows were used, dropped and cut."""
    data, stage = settings.data, settings.method.stage
    conversations, tally = read_conversations(names, data, stage)
    if stage == "pt":
        return encode_texts(tokenizer, conversations, data.cutoff_len), tally

    template = make_template(data.template, tokenizer, data.default_system)
    encoded, later_tally = template.encode(
        conversations,
        cutoff_len=data.cutoff_len,
        train_on_prompt=data.train_on_prompt,
        mask_history=data.mask_history,
    )
    return encoded, tally.then(later_tally)


def _hold_out(
    encoded: list[Encoded], size: float, seed: int
) -> tuple[list[Encoded], list[Encoded]]:
    """Documents to train on, and those that are kept for validation, drawn by the seed.

    size: a number of documents if it is 1 or more, else their share, rounded up. Both lists keep
    the order of the rows.
    """
    count = int(size) if size >= 1 else math.ceil(size * len(encoded))
    if count >= len(encoded):
        raise RequestError(
            [f"val_size: {count} of {len(encoded)} documents leave none to train on"]
        )
    held = set(permutation(len(encoded), seed, HOLD_OUT)[:count].tolist())
    kept = [document for index, document in enumerate(encoded) if index not in held]
    return kept, [encoded[index] for index in sorted(held)]


def _check_vocabulary(
    documents: Documents, validation: Documents, shape: LlamaShape, base: Path
) -> None:
    """Raises RequestError for a token that the model's embedding does not have."""
    highest = max(int(part.tokens.max(initial=0)) for part in (documents, validation))
    if highest >= shape.vocab_size:
        raise RequestError(
            [
                f"{base / 'tokenizer.json'}: makes token {highest}, beyond the vocab_size "
                f"{shape.vocab_size} of config.json; is it another model's tokenizer?"
            ]
        )


def _length_warning(documents: Documents, validation: Documents, shape: LlamaShape) -> str:
    """A line about documents that are longer than the model was made for; "" if there is none."""
    longest = max(int(part.lengths.max(initial=0)) for part in (documents, validation))
    if shape.max_positions is None or longest <= shape.max_positions:
        return ""
    return (
        f"\nthe longest document has {longest:,} tokens, and the base model was made for "
        f"{shape.max_positions:,} (max_position_embeddings): lower cutoff_len"
    )
