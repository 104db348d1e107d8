"""Look before you launch: `python -m minilora.preview CONFIG` shows the data as the model gets it.

It needs the tokenizer and the config.json of the base model: no weights, no GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from minilora.data.chat import show
from minilora.data.documents import Documents, Int64s
from minilora.data.prepare import Prepared, prepare
from minilora.data.schedule import Schedule
from minilora.data.steps import Place, TileLimits, build_step
from minilora.files.model_config import read_model_config
from minilora.files.model_families import window_problem
from minilora.model.lora_shape import LoraShape
from minilora.report.curves import drawing, label, new_figure
from minilora.settings.command_line import read_options
from minilora.settings.errors import RequestError, exit_code
from minilora.settings.settings import Settings
from minilora.settings.terminal import Lasting
from minilora.training.advice import Amounts, advice

# The histogram of document lengths: a line per range of lengths, and a bar in each.
MOST_LINES = 12
LONGEST_BAR = 40  # characters; the bar of the range with the most documents


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 done, 1 the picture cannot be written, 2 the request is wrong."""
    return exit_code(lambda: run(*read_options(_parser(), argv, "preview")))


def run(own: argparse.Namespace, settings: Settings) -> None:
    """Read the data and print what it looks like. Raises RequestError."""
    problems = []
    if own.samples < 0:
        problems.append("--samples must be at least 0")
    if own.num_gpus < 1:
        problems.append("--num_gpus must be at least 1")
    if problems:
        raise RequestError(problems)
    for notice in settings.notices:
        print(notice, file=sys.stderr)

    config = read_model_config(settings.base)
    shape = config.shape
    if problems := window_problem(shape, settings.data.cutoff_len, "cutoff_len"):
        raise RequestError(problems)
    lora = LoraShape.of(settings.method, shape)
    prepared = prepare(settings, shape, colour=False)
    documents = prepared.documents
    for sample in samples(prepared, own.samples, sys.stdout.isatty()):
        print(sample)
    print(prepared.summary, end="\n\n")
    print(*histogram(documents.lengths), sep="\n", end="\n\n")
    print(*steps(documents, settings, own.num_gpus, shape.break_even_length), sep="\n")

    schedule = Schedule.of(documents.lengths, settings, own.num_gpus, shape.break_even_length)
    amounts = Amounts.of(documents, schedule)
    for line in advice(config.values["model_type"], shape, lora, settings.train, amounts):
        print(line)

    if own.plot:
        with drawing("--plot", own.plot):
            _plot(own.plot, documents.lengths, settings.data.cutoff_len)


def samples(prepared: Prepared, count: int, colour: bool) -> Iterator[str]:
    """Documents from all over the data: what each has, and its text, the trained part marked."""
    documents = prepared.documents
    labelled = documents.labelled
    last = len(documents) - 1
    mark = "green" if colour else "[[ ]]"
    for index in np.linspace(0, last, min(count, len(documents)), dtype=int).tolist():
        tokens, trained = documents[index]
        yield (
            f"--- document {index + 1:,} of {len(documents):,}: {len(tokens):,} tokens, "
            f"{labelled[index]:,} of them trained ({mark}) ---"
        )
        yield f"{show(prepared.tokenizer, (tokens, trained), colour)}\n"


def histogram(lengths: Int64s) -> Iterator[str]:
    """Lines: how long documents are, and how many there are of each length."""
    shortest, median, longest = np.quantile(lengths, [0, 0.5, 1])
    yield (
        f"tokens per document: shortest {shortest:,.0f}, median {median:,.0f}, "
        f"longest {longest:,.0f}, mean {lengths.mean():,.1f}"
    )

    # Ranges of a round size, 1, 2, 5, 10, 20, ..., the smallest that needs few enough lines.
    round_sizes = (digit * 10**power for power in range(10) for digit in (1, 2, 5))
    size = next(size for size in round_sizes if size * MOST_LINES >= longest)
    counts = np.bincount((lengths - 1) // size)  # range 0 is from 1 to `size`
    so_far = np.cumsum(counts) / len(lengths)
    most = int(counts.max())

    # Ranges shorter than all documents are left out.
    yield f"{'from':>9}{'to':>9}{'documents':>11}{'so far':>8}"
    for index in range(int((counts > 0).argmax()), len(counts)):
        count = int(counts[index])
        bar = "#" * math.ceil(LONGEST_BAR * count / most)
        ends = f"{index * size + 1:>9,}{(index + 1) * size:>9,}"
        yield f"{ends}{count:>11,}{so_far[index]:>8.0%}  {bar}"


def steps(
    documents: Documents, settings: Settings, ranks: int, break_even_length: float
) -> Iterator[str]:
    """Lines: optimizer steps with and without packing, how full tiles are, what padding would cost.

    All of the first epoch, in its order.
    """
    asked = Schedule.of(documents.lengths, settings, ranks, break_even_length)
    yield from _step_counts(documents, settings, asked, ranks)
    order = [asked.document_ids(step) for step in range(asked.steps_per_epoch(0))]
    yield _tile_use(documents, settings, asked, order, ranks)
    yield _padding_cost(
        documents.lengths[np.concatenate(order)], settings.train.per_device_train_batch_size
    )


def _step_counts(
    documents: Documents, settings: Settings, asked: Schedule, ranks: int
) -> Iterator[str]:
    """Lines of a table: steps and what they hold, without packing and with it."""
    cutoff, rows = settings.data.cutoff_len, asked.rows_per_step
    tokens = len(documents.tokens)
    gpus = "1 GPU" if ranks == 1 else f"{ranks} GPUs"
    names = ("steps/epoch", "all steps", "documents/step", "tokens/step")
    yield f"{f'on {gpus} (* is set)':<20}" + "".join(f"{name:>15}" for name in names)

    for packing in (False, True):
        schedule = replace(asked, packing=packing)
        count = schedule.steps_per_epoch(0)
        line = "*" if packing == settings.packs else " "
        line += f" packing: {str(packing).lower():<9}{count:>15,}{schedule.total_steps:>15,}"
        line += f"{len(documents) / count:>15,.1f}{tokens / count:>15,.0f}"
        if packing:  # a packed step has room for so many tokens
            line += f"   {tokens / count / (rows * cutoff):.0%} of {rows:,} x {cutoff:,} tokens"
        yield line


def _tile_use(
    documents: Documents, settings: Settings, asked: Schedule, order: list[Int64s], ranks: int
) -> str:
    """A line: how full the tiles of rank 0 are. order: document ids of each step."""
    train = settings.train
    limits = TileLimits(train.least_tile_tokens, train.gather_tokens)
    tiles = []
    for number, rows in enumerate(order):
        step = build_step(documents, rows, number, asked, Place(0, ranks), limits)
        tiles += [sum(tile) for span in step.spans for tile in span.tiles]

    # A document longer than tile_tokens is one full tile, not more than one.
    used = sum(tiles) / sum(max(tile, limits.tile_tokens) for tile in tiles)
    return (
        f"a tile has {np.mean(tiles):,.0f} tokens on average: {used:.0%} of tile_tokens, "
        f"{limits.tile_tokens:,}"
    )


def _padding_cost(lengths: Int64s, batch: int) -> str:
    """A line: what a trainer adds that pads batches to their longest document.

    lengths: (n,) int64, tokens of each document, in the order of the epoch.
    """
    total = int(lengths.sum())
    batches = np.split(lengths, range(batch, len(lengths), batch))
    padded = sum(len(one) * int(one.max()) for one in batches)
    return (
        f"nothing is padded here; batches of {batch} padded to their longest would cost "
        f"{padded - total:,} tokens more, {padded / total - 1:.0%}"
    )


def _plot(path: str, lengths: Int64s, cutoff: int) -> None:
    """Draw how many documents there are of each length, and where they are cut."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    axes.hist(lengths, bins=50, color="#4c78a8")
    if lengths.max() > cutoff / 2:  # else the line would lie far away from all documents
        axes.axvline(cutoff, color="black", linewidth=1, label=f"cutoff_len {cutoff:,}")
        axes.legend(frameon=False)
    label(axes, "tokens per document", "documents")
    figure.savefig(path, dpi=150)


def _parser() -> argparse.ArgumentParser:
    """What is this command's own; everything else is a setting."""
    parser = argparse.ArgumentParser(
        "python -m minilora.preview", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--samples", type=int, default=3, help="how many documents to show [3]")
    parser.add_argument("--num_gpus", type=int, default=1, help="that will train [1]")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the lengths of the documents")
    return parser


if __name__ == "__main__":
    sys.stdout = Lasting(sys.stdout.buffer, write_through=True)  # `| head` ends before it
    sys.exit(main())
