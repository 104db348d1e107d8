"""From the settings to tokenised documents: read, render, tokenise, count what was dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass

from minilora.data.chat import Encoded, encode_texts, make_template, show
from minilora.data.datasets import Tally, read_conversations
from minilora.data.documents import Documents
from minilora.data.schedule import permutation
from minilora.data.tokenizer import Tokenizer, load_tokenizer
from minilora.model.llama_shape import LlamaShape
from minilora.settings.errors import RequestError
from minilora.settings.settings import Settings


@dataclass(frozen=True)
class Prepared:
    """Documents to train on and to validate with; what was used and dropped, in words.

    sample: the first one, see `show`. tokenizer: that of the base model, to show others.
    """

    documents: Documents
    validation: Documents
    summary: str
    sample: str
    tokenizer: Tokenizer


def prepare(settings: Settings, shape: LlamaShape, colour: bool) -> Prepared:
    """Read and tokenise the datasets of a run.

    colour: mark the trained part of the sample in green. Raises RequestError.
    """
    data, folder = settings.data, settings.base
    tokenizer = load_tokenizer(folder)
    encoded, tally = _encode(settings, data.dataset, tokenizer)
    held_out: list[Encoded] = []
    held_tally = None
    if data.eval_dataset:
        held_out, held_tally = _encode(settings, data.eval_dataset, tokenizer)
    elif data.val_size:
        encoded, held_out = _hold_out(encoded, data.val_size, settings.train.seed)
    documents, validation = Documents.of(encoded), Documents.of(held_out)
    both = (documents, validation)
    highest = max(int(part.tokens.max(initial=0)) for part in both)
    if highest >= shape.vocab_size:
        raise RequestError(
            [
                f"{folder / 'tokenizer.json'}: makes token {highest}, beyond the vocab_size "
                f"{shape.vocab_size} of config.json; is it another model's tokenizer?"
            ]
        )
    summary = (
        f"{tally.summary()}; {len(documents)} documents, {len(documents.tokens):,} tokens, "
        f"{int(documents.labelled.sum()):,} of them trained"
        + (f"; {len(validation)} documents to validate with" if held_out else "")
        + (f" ({held_tally.summary()})" if held_tally else "")
    )
    longest = max(int(part.lengths.max(initial=0)) for part in both)
    if shape.max_positions is not None and longest > shape.max_positions:
        summary += (
            f"\nthe longest document has {longest:,} tokens, and the base model was made for "
            f"{shape.max_positions:,} (max_position_embeddings): lower cutoff_len"
        )
    sample = show(tokenizer, encoded[0], colour)
    return Prepared(documents, validation, summary, sample, tokenizer)


def _encode(
    settings: Settings, names: tuple[str, ...], tokenizer: Tokenizer
) -> tuple[list[Encoded], Tally]:
    data, stage = settings.data, settings.method.stage
    conversations, tally = read_conversations(names, data, stage)
    if stage == "pt":
        return encode_texts(tokenizer, conversations, data.cutoff_len), tally
    template = make_template(data.template, tokenizer, data.default_system)
    encoded, later = template.encode(
        conversations,
        cutoff_len=data.cutoff_len,
        train_on_prompt=data.train_on_prompt,
        mask_history=data.mask_history,
    )
    return encoded, tally.then(later)


def _hold_out(
    encoded: list[Encoded], size: float, seed: int
) -> tuple[list[Encoded], list[Encoded]]:
    """A number (1 or more) or a share of the documents, drawn by the seed, kept for validation."""
    count = int(size) if size >= 1 else math.ceil(size * len(encoded))
    if count >= len(encoded):
        raise RequestError(
            [f"val_size: {count} of {len(encoded)} documents leave none to train on"]
        )
    held = set(permutation(len(encoded), seed, 0x7E57)[:count].tolist())
    kept = [document for index, document in enumerate(encoded) if index not in held]
    return kept, [encoded[index] for index in sorted(held)]
