"""Look before you launch: `python -m minilora.preview CONFIG` shows the data as the model gets it.

It needs the tokenizer and the config.json of the base model: no weights, no GPU.
"""

from __future__ import annotations

import argparse
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
from minilora.report.curves import drawing, label, new_figure
from minilora.settings.command_line import read_options
from minilora.settings.errors import RequestError, exit_code
from minilora.settings.settings import Settings
from minilora.settings.terminal import Lasting

BINS, WIDTH = 12, 40  # of the histogram: at most so many lines, and characters in the longest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 done, 1 the picture cannot be written, 2 the request is wrong."""
    return exit_code(lambda: run(*read_options(_parser(), argv, "preview")))


def run(own: argparse.Namespace, settings: Settings) -> None:
    """Read the data and print what it looks like. Raises RequestError."""
    least = {"--samples must be at least 0": own.samples >= 0,
             "--num_gpus must be at least 1": own.num_gpus >= 1}  # fmt: skip
    if problems := [problem for problem, held in least.items() if not held]:
        raise RequestError(problems)
    print(*settings.notices, sep="\n", end="\n" * bool(settings.notices), file=sys.stderr)
    shape = read_model_config(settings.base).shape
    prepared = prepare(settings, shape, colour=False)
    documents = prepared.documents
    print(
        *samples(prepared, own.samples, sys.stdout.isatty()),
        prepared.summary,
        "",
        *histogram(documents.lengths),
        "",
        *steps(documents, settings, own.num_gpus, shape.break_even_length),
        sep="\n",
    )
    if own.plot:
        with drawing("--plot", own.plot):
            _plot(own.plot, documents.lengths, settings.data.cutoff_len)


def samples(prepared: Prepared, count: int, colour: bool) -> Iterator[str]:
    """Documents from all over the data: what each has, and its text, the trained part marked."""
    documents = prepared.documents
    labelled, last = documents.labelled, len(documents) - 1
    for index in np.linspace(0, last, min(count, len(documents)), dtype=int).tolist():
        ids, trained = documents[index]
        yield (
            f"--- document {index + 1:,} of {len(documents):,}: {len(ids):,} tokens, "
            f"{labelled[index]:,} of them trained ({'green' if colour else '[[ ]]'}) ---"
        )
        yield f"{show(prepared.tokenizer, (ids, trained), colour)}\n"


def histogram(lengths: Int64s) -> Iterator[str]:
    """Lines: how long documents are, and how many there are of each length."""
    at = dict(
        zip(("shortest", "median", "longest"), np.quantile(lengths, [0, 0.5, 1]), strict=True)
    )
    told = ", ".join(f"{name} {value:,.0f}" for name, value in at.items())
    yield f"tokens per document: {told}, mean {lengths.mean():,.1f}"
    sizes = (base * 10**power for power in range(10) for base in (1, 2, 5))
    size = next(size for size in sizes if size * BINS >= lengths.max())
    counts = np.bincount((lengths - 1) // size)
    shares = np.cumsum(counts) / len(lengths)
    first = int((counts > 0).argmax())
    yield f"{'from':>9}{'to':>9}{'documents':>11}{'so far':>8}"
    for index, count in enumerate(counts[first:].tolist(), first):
        bar = "#" * -(-WIDTH * count // int(counts.max()))
        edges = f"{index * size + 1:>9,}{(index + 1) * size:>9,}"
        yield f"{edges}{count:>11,}{shares[index]:>8.0%}  {bar}"


def steps(
    documents: Documents, settings: Settings, ranks: int, break_even_length: float
) -> Iterator[str]:
    """Lines: optimizer steps with and without packing, how full tiles are, what padding would cost.

    All of the first epoch, in its order; the tiles are those of rank 0.
    """
    train, cutoff = settings.train, settings.data.cutoff_len
    batch = train.per_device_train_batch_size
    asked = Schedule.of(documents.lengths, settings, ranks, break_even_length)
    rows = asked.rows_per_step
    total, room = len(documents.tokens), rows * cutoff
    names = ("steps/epoch", "all steps", "documents/step", "tokens/step")
    gpus = f"on {ranks} GPU{'s' * (ranks > 1)}, * asked"
    yield f"{gpus:<20}" + "".join(f"{name:>15}" for name in names)
    for packing in (False, True):
        plan = replace(asked, packing=packing)
        count = plan.steps_per_epoch(0)
        full = f"   {total / count / room:.0%} of {rows:,} x {cutoff:,}" * packing
        yield (
            f"{'*' if packing == settings.packs else ' '} {f'packing: {packing}'.lower():<18}"
            f"{count:>15,}{plan.total_steps:>15,}{len(documents) / count:>15,.1f}"
            f"{total / count:>15,.0f}{full}"
        )
    order = [asked.rows(step) for step in range(asked.steps_per_epoch(0))]
    limits = TileLimits(train.tile_tokens, train.gather_tokens)
    tiles = [
        sum(tile)
        for step, chosen in enumerate(order)
        for span in build_step(documents, chosen, step, asked, Place(0, ranks), limits).spans
        for tile in span.tiles
    ]
    used = sum(tiles) / sum(max(tile, train.tile_tokens) for tile in tiles)
    yield (
        f"a tile has {np.mean(tiles):,.0f} tokens on average: {used:.0%} of tile_tokens, "
        f"{train.tile_tokens:,}"
    )
    lengths = documents.lengths[np.concatenate(order)]
    batches = np.split(lengths, range(batch, len(lengths), batch))
    padded = sum(len(one) * int(one.max()) for one in batches)
    yield (
        f"nothing is padded here; batches of {batch} padded to their longest would cost "
        f"{padded - total:,} tokens more, {padded / total - 1:.0%}"
    )


def _plot(path: str, lengths: Int64s, cutoff: int) -> None:
    """Draw how many documents there are of each length, and where they are cut."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    axes.hist(lengths, bins=50, color="#4c78a8")
    if lengths.max() > cutoff / 2:  # else it lies far away from all of them
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
