"""Figures 6 and 7: a frozen weight from the file to its product, and a lora_B to its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from drawing import facts
from drawing.canvas import (
    BLUE,
    CODE,
    PALE_BLUE,
    PALE_GREEN,
    PALE_GREY,
    PALE_ORANGE,
    PALE_PURPLE,
    PAPER,
    SMALL,
    TEXT,
    TITLE,
    Area,
    Canvas,
)


def one_weight() -> str:
    """A weight of the 8B model: the bytes each rank reads, its partition, gathered, used, freed."""
    job = facts.article()
    rows, columns = facts.weight_shape(job)
    parts, total = facts.partition(rows * columns, job), rows * columns * job.size
    picture = Canvas("One frozen weight from the file to its product", 960, 556)
    picture.text(20, 28, f"1. In the safetensors file: {facts.WEIGHT}.weight", TITLE)
    size = f"{rows:,} x {columns:,} in bf16 = {total:,} bytes"
    picture.text(20, 50, f"{size}. Rank r starts to read at this byte of the tensor:")
    title = "2. On each GPU: its partition, a seventh of the flat tensor; numbers, and bytes"
    picture.text(20, 138, title, TITLE)
    words = "all-gather, together with the other weights of the block, when its turn comes:"
    picture.text(20, 232, words)
    _partitions(picture, parts)

    picture.text(20, 284, "3. On every GPU for as long as the block computes", TITLE)
    whole = Area(20, 294, 920, 34)
    picture.box(whole, BLUE)
    words = f"all {rows:,} x {columns:,}, {total:,} bytes"
    picture.label(whole, [words], replace(TEXT, colour=PAPER))
    tiles = f"all {job.step_tokens // job.tile} tiles of the span use the same gathered weight"
    picture.text(20, 362, f"4. The product, for one tile after the other: {tiles}", TITLE)
    _product(picture, 376, (job.tile, rows, columns))

    picture.text(20, 494, "5. After the block", TITLE)
    row, column = divmod(parts[1].elements, columns)
    lines = [
        "All but the partition is freed; backward gathers the weight once more. The cut goes "
        "through the flat tensor:",
        f"rank 1 begins within row {row:,}, at column {column:,}, both counted from 0. The last "
        f"rank's part is {parts[0].elements - parts[-1].elements} numbers shorter.",
    ]
    picture.paragraph(20, 516, lines)
    return picture.svg()


def _partitions(picture: Canvas, parts: Sequence[facts.Part]) -> None:
    """A column for each rank, from the file to its partition and on to the gathered weight."""
    width = 920 / len(parts)
    for rank, part in enumerate(parts):
        x = 20 + width * rank
        in_file, here = Area(x, 60, width, 30), Area(x + 3, 150, width - 6, 62)
        picture.box(in_file, PALE_GREY)
        picture.label(in_file, [f"{part.first_byte:,}"], SMALL)
        picture.arrow([(x + width / 2, 92), (x + width / 2, 122)])
        picture.box(here, PALE_BLUE)
        size = part.end_byte - part.first_byte
        picture.label(here, [f"rank {rank}", f"{part.elements:,}", f"{size:,} B"], SMALL)
        picture.arrow([(x + width / 2, 240), (x + width / 2, 266)])


def _product(picture: Canvas, y: float, sizes: tuple[int, int, int]) -> None:
    """x W^T for one tile, and LoRA's part added to it."""
    tokens, rows, columns = sizes
    weight = Area(206, y, 150, 84)
    picture.box(weight, BLUE)
    picture.label(weight, ["W.T", f"{columns:,} x {rows:,}"], replace(SMALL, colour=PAPER))
    others = (
        (Area(20, y, 150, 44), PALE_GREY, ["x", f"{tokens:,} x {columns:,}"]),
        (Area(386, y, 202, 44), PALE_ORANGE, ["LoRA:", "scaling * x @ A.T @ B.T"]),
        (Area(620, y, 150, 44), PALE_GREEN, ["y", f"{tokens:,} x {rows:,}"]),
    )
    for area, fill, words in others:
        picture.box(area, fill)
        picture.label(area, words, SMALL)
    for x, sign in ((188, "@"), (371, "+"), (604, "=")):
        picture.text(x, y + 27, sign, replace(TITLE, anchor="middle"))


class Station(NamedTuple):
    """A box on the way of a lora_B: its corner, its colour, its name, and what happens there."""

    corner: tuple[float, float]
    fill: str
    name: str
    lines: Sequence[str]


COLUMNS, ROWS, SIZE = (16.0, 332.0, 648.0), (44.0, 170.0, 296.0), (296.0, 88.0)


def one_lora_b() -> str:
    """A lora_B: zero, its gradient, the fp32 master, and the adapter file."""
    job = facts.article()
    pair = facts.lora_b(job)
    count = f"{pair.rows:,} x {pair.rank} = {pair.rows * pair.rank:,} numbers"
    picture = Canvas("One lora_B from zero to the adapter file", 960, 452)
    picture.text(20, 28, f"{facts.WEIGHT}.lora_B: {count}", TITLE)
    for corner, fill, name, lines in (*_in_a_step(job, pair), *_after_it(job, pair)):
        picture.titled(Area(*corner, *SIZE), fill, name, lines)
    _arrows(picture)
    picture.text(20, 414, "Its name in the file, which is PEFT's:")
    picture.text(20, 436, pair.name, CODE)
    return picture.svg()


def _in_a_step(job: facts.Job, pair: facts.LoraB) -> list[Station]:
    """Forward and backward."""
    elements, tiles = pair.rows * pair.rank, job.step_tokens // job.tile
    part = facts.partition(elements, job)[0].elements
    where = "whole on every GPU:" if pair.whole else "split over the GPUs:"
    return [
        Station(
            (COLUMNS[0], ROWS[0]),
            PALE_GREY,
            "1. It begins as zero",
            [
                f"{elements * job.size:,} B in bf16, {where}",
                "ZeRO-3 frees only tensors of more than",
                f"{job.zero.stage3_param_persistence_threshold:,} numbers",
            ],
        ),
        Station(
            (COLUMNS[1], ROWS[0]),
            PALE_BLUE,
            "2. Forward",
            [
                "y = W x + scaling * B (A x), in bf16;",
                f"scaling = alpha / rank = {pair.scaling:g}. While B is",
                "zero, y is what the base model gives",
            ],
        ),
        Station(
            (COLUMNS[2], ROWS[0]),
            PALE_ORANGE,
            "3. Backward",
            [
                f"the gradients of {tiles} tiles are added up in",
                f"fp32, {4 * elements:,} B, and the sum goes",
                "to DeepSpeed once per span, in bf16",
            ],
        ),
        Station(
            (COLUMNS[2], ROWS[1]),
            PALE_ORANGE,
            f"4. The mean over {job.ranks} ranks",
            [
                f"reduce-scatter: each rank keeps {part:,}",
                "numbers. The loss is scaled so that this",
                "is the mean over all labelled tokens",
            ],
        ),
    ]


def _after_it(job: facts.Job, pair: facts.LoraB) -> list[Station]:
    """The optimizer, and the end of the run."""
    elements = pair.rows * pair.rank
    part = facts.partition(elements, job)[0].elements
    return [
        Station(
            (COLUMNS[1], ROWS[1]),
            PALE_GREEN,
            "5. AdamW, in fp32",
            [
                "after clipping, each rank moves its part",
                "of the fp32 master; with both moments",
                f"that is {3 * 4 * part:,} B",
            ],
        ),
        Station(
            (COLUMNS[0], ROWS[1]),
            PALE_GREY,
            "6. Back to bf16",
            [
                "the new values are rounded to bf16 and",
                "gathered: every GPU has the whole",
                "lora_B for the next forward",
            ],
        ),
        Station(
            (COLUMNS[1], ROWS[2]),
            PALE_GREEN,
            "7. After the last step",
            [
                f"rank 0 gets the fp32 master, {4 * elements:,} B,",
                "by its name. A lora_B that is still zero",
                "everywhere ends the run with an error",
            ],
        ),
        Station(
            (COLUMNS[2], ROWS[2]),
            PALE_PURPLE,
            f"8. {pair.file}",
            [
                "written under another name, renamed",
                "when it is whole, read back, and",
                "compared with what was trained",
            ],
        ),
    ]


def _arrows(picture: Canvas) -> None:
    """The order of the stations, and the way back to the next step."""
    (first, second, third), (top, middle, bottom), (width, height) = COLUMNS, ROWS, SIZE
    half, low = height / 2, top + height
    picture.arrow([(first + width + 4, top + half), (second - 4, top + half)])
    picture.arrow([(second + width + 4, top + half), (third - 4, top + half)])
    picture.arrow([(third + width / 2, low + 4), (third + width / 2, middle - 4)])
    picture.arrow([(third - 4, middle + half), (second + width + 4, middle + half)])
    picture.arrow([(second - 4, middle + half), (first + width + 4, middle + half)])
    picture.arrow(
        [
            (first + width / 2, middle - 4),
            (first + width / 2, low + 19),
            (second + width / 2, low + 19),
            (second + width / 2, low + 4),
        ]
    )
    picture.text(first + width / 2 + 12, low + 14, "next step", SMALL)
    picture.arrow([(second + width / 2, middle + height + 4), (second + width / 2, bottom - 4)])
    picture.arrow([(second + width + 4, bottom + half), (third - 4, bottom + half)])
