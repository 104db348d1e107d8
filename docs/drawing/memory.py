"""Figures 1, 2 and 4: what fills the memory, what bounds it, and when weights are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from drawing import facts
from drawing.canvas import (
    BLUE,
    EDGE,
    FAINT,
    GREEN,
    GREY,
    INK,
    NOTE,
    ORANGE,
    PALE_BLUE,
    PALE_GREEN,
    PALE_GREY,
    PALE_ORANGE,
    PALE_PURPLE,
    PAPER,
    PURPLE,
    SMALL,
    TITLE,
    Area,
    Canvas,
)

COLOURS = {
    "parameters": BLUE,
    "activations": ORANGE,
    "optimizer states": GREEN,
    "accumulation": PURPLE,
    "fixed": GREY,
}
GIB_WIDTH = 29  # units per GiB in figure 1


def four_parts() -> str:
    """The memory of one GPU by its parts, in three ways, beside what the card has."""
    job, spans = facts.article(), facts.in_spans()
    whole = (
        "Without ZeRO: the whole model on each GPU, the Trainer's loss, one micro-batch of 4 rows"
    )
    once = f"minilora, ZeRO-3: the step of {job.step_tokens:,} tokens in one span"
    cut = f"minilora, ZeRO-3, gather_tokens {spans.span:,}: the same step in {spans.spans} spans"
    ways: dict[str, Mapping[str, int]] = {
        whole: facts.without_zero(job),
        once: facts.plan(job).parts,
        cut: facts.plan(spans).parts,
    }

    picture = Canvas("The memory of one GPU of the article's job, by its parts", 960, 346)
    what = f"Llama-3.1-8B, LoRA rank {job.adapter.rank}, bf16, on each of {job.ranks} GPUs"
    picture.text(20, 28, f"{what}: GiB at the peak", TITLE)
    limit = 20 + facts.in_gib(facts.card()) * GIB_WIDTH
    for index, (name, parts) in enumerate(ways.items()):
        y = 66 + 100 * index
        _bar(picture, y, name, parts)
        picture.line([(limit, y + 4), (limit, y + 46)], INK, dashed=True)

    words = f"a card of {facts.CARD_GB} GB has {facts.gib(facts.card())}"
    picture.text(limit, 50, words, replace(SMALL, bold=True, anchor="middle"))
    picture.line([(limit, 54), (limit, 70)], INK, dashed=True)
    return picture.svg()


def _bar(picture: Canvas, y: float, name: str, parts: Mapping[str, int]) -> None:
    """One way: its name, its bar, and the number of each part with the part's colour."""
    picture.text(20, y, name)
    x = 20.0
    for part, colour in COLOURS.items():
        width = facts.in_gib(parts[part]) * GIB_WIDTH
        picture.box(Area(x, y + 10, width, 30), colour, edge="")
        x += width
    picture.text(x + 8, y + 30, facts.gib(sum(parts.values())), TITLE)

    x = 20.0
    for part, colour in COLOURS.items():
        words = f"{part} {facts.gib(parts[part])}"
        if part == "fixed":
            words += ", estimated"
        picture.box(Area(x, y + 50, 10, 10), colour, edge="")
        picture.text(x + 15, y + 60, words, NOTE)
        x += NOTE.width(words) + 30


def nested_boxes() -> str:
    """Step, span, tile, piece and loss chunk inside each other, with what sets each."""
    job = facts.in_spans()
    picture = Canvas("Step, span, tile, piece and loss chunk inside each other", 960, 406)
    rows = job.step_tokens // job.longest
    product = f"{rows} rows of {job.longest:,}, batch size x accumulation"
    picture.titled(
        Area(12, 12, 936, 382),
        PALE_GREY,
        f"optimizer step: {job.step_tokens:,} tokens",
        [f"all that one GPU adds up before the optimizer moves: {product}"],
    )
    inputs = facts.gib(facts.term(job, "block inputs saved"))
    picture.titled(
        Area(28, 70, 730, 310),
        PALE_GREEN,
        f"span 1: {job.span:,} tokens (gather_tokens)",
        [
            "shares one gather of each block in each direction;",
            f"block inputs saved for backward: {inputs} GiB",
        ],
    )
    _siblings(picture, [Area(774 + 56 * at, 70, 48, 310) for at in range(job.spans - 1)], "span")

    picture.text(44, 160, "inside each block, one after the other:", NOTE)
    _tile(picture, job)
    tiles = job.span // job.tile
    _siblings(picture, [Area(344 + 46 * at, 172, 38, 192) for at in range(tiles - 1)], "tile")

    picture.text(486, 160, "inside the head, one after the other:", NOTE)
    _chunks(picture, job)
    return picture.svg()


def _tile(picture: Canvas, job: facts.Job) -> None:
    """A tile, and inside it a piece; and what becomes of a long document."""
    picture.titled(
        Area(44, 172, 290, 192),
        PALE_BLUE,
        f"tile 1: {job.tile:,} tokens",
        ["(tile_tokens) whole documents: what", "attention computes at a time"],
    )
    long = facts.with_documents_of(job, job.span)
    picture.titled(
        Area(56, 250, 266, 104),
        PALE_PURPLE,
        f"piece: {job.piece:,} tokens",
        [
            "what the MLP computes at a time;",
            "here the tile is one piece. A",
            f"document of {long.longest:,} tokens would",
            f"be one tile, in {long.tile // long.piece} pieces",
        ],
    )


def _chunks(picture: Canvas, job: facts.Job) -> None:
    """The span once more, as the loss goes through it."""
    size = facts.gib(facts.term(job, "loss chunk"))
    picture.titled(
        Area(486, 172, 260, 96),
        PALE_ORANGE,
        f"loss chunk 1: {job.loss_tokens:,} tokens",
        [
            "(loss_tokens) the logits of so",
            "many labelled tokens exist at",
            f"one time, {size} GiB of them",
        ],
    )
    places = [(at % 4, at // 4) for at in range(job.span // job.loss_tokens - 1)]
    areas = [Area(486 + 66 * column, 278 + 46 * row, 60, 40) for column, row in places]
    _siblings(picture, areas, "chunk", PALE_ORANGE)


def _siblings(picture: Canvas, areas: Sequence[Area], name: str, fill: str = "") -> None:
    """The second box of a kind and those after it, without their contents."""
    fills = {"span": PALE_GREEN, "tile": PALE_BLUE}
    for number, area in enumerate(areas, 2):
        picture.box(area, fill or fills[name])
        picture.label(area, [name, str(number)], SMALL)


def gathers_over_time() -> str:
    """Two neighbouring blocks over forward and backward, and all that is held at each moment."""
    moments = facts.gathers(facts.article())
    picture = Canvas("When the weights of two neighbouring blocks are on a GPU", 960, 556)
    number = 15  # any block but the first and the last ones behaves like this
    pair = (f"block {number}", f"block {number + 1}")
    window = (f"block {number - 1}", *pair, f"block {number + 2}")
    height = "full height = all of a block's weights are on this GPU, low = its own seventh"
    picture.text(20, 28, f"Two blocks: {height}", TITLE)
    for row, name in enumerate(pair):
        picture.text(20, 134 + 96 * row, name, replace(SMALL, bold=True))

    for backward, left in ((False, 92), (True, 528)):
        direction = "backward" if backward else "forward"
        picture.text(left, 56, f"{direction}: this block is computing", NOTE)
        shown = [held for held in moments if held.name in window and held.backward is backward]
        for column, held in enumerate(shown):
            head = Area(left + 104 * column, 64, 100, 20)
            picture.box(head, PALE_GREY, edge="")
            picture.label(head, [held.name], SMALL)
            later = shown[column + 1].name if column + 1 < len(shown) else ""
            for row, name in enumerate(pair):
                cell = Area(head.x, 88 + 96 * row, 100, 84)
                _presence(picture, cell, name == held.name, held.ahead and name == later)

    lines = [
        "The gather of a block begins when the block before it begins to compute, and the block is "
        "freed when it is done.",
        "In backward its recompute and its gradients happen in the same visit, so that one gather "
        "serves both.",
    ]
    picture.paragraph(20, 296, lines)
    _held(picture, moments)
    return picture.svg()


def _presence(picture: Canvas, cell: Area, working: bool, coming: bool) -> None:
    """How much of a block is here while one column's block computes."""
    if working:
        picture.box(cell, BLUE)
        picture.label(cell, ["all here,", "at work"], replace(SMALL, colour=PAPER))
    elif coming:
        picture.box(cell, PALE_BLUE, dashed=True)
        picture.label(cell, ["being", "gathered"], SMALL)
    else:
        low = cell.height / facts.RANKS
        picture.box(Area(cell.x, cell.y + cell.height - low, cell.width, low), GREY, edge="")
        above = Area(cell.x, cell.y, cell.width, cell.height - low)
        picture.label(above, [f"1/{facts.RANKS}"], SMALL)


def _held(picture: Canvas, moments: Sequence[facts.Held]) -> None:
    """A bar for each moment: GiB of gathered weights."""
    base, scale, left, step = 520.0, 95.0, 70.0, 11.8
    right, most = left + step * len(moments), max(moment.arriving for moment in moments)
    title = "GiB of gathered weights at each moment of a span (pale: while they arrive)"
    picture.text(20, 360, f"{title}; the most: {facts.gib(most)}", TITLE)

    for level in (0.5, 1.0):
        y = base - level * scale
        picture.line([(left - 6, y), (right, y)], FAINT)
        picture.text(left - 10, y + 4, str(level), replace(SMALL, anchor="end"))
    for index, moment in enumerate(moments):
        x = left + step * index
        arriving, held = facts.in_gib(moment.arriving) * scale, facts.in_gib(moment.held) * scale
        if arriving > held:
            picture.box(Area(x, base - arriving, step - 2, arriving - held), PALE_BLUE, dashed=True)
        picture.box(Area(x, base - held, step - 2, held), BLUE, edge="")
    picture.line([(left - 6, base), (right, base)], EDGE)

    turn = left + step * [moment.backward for moment in moments].index(True)
    picture.line([(turn - 1, base - 1.45 * scale), (turn - 1, base + 26)], INK, dashed=True)
    below = replace(NOTE, anchor="middle")
    picture.text((left + turn) / 2, base + 22, "forward: embedding, blocks, head", below)
    picture.text((turn + right) / 2, base + 22, "backward: head, blocks", below)
