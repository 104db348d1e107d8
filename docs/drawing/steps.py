"""Figures 3 and 5: a row on its way into a span, and what a block saves and recomputes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from drawing import facts
from drawing.canvas import (
    CODE,
    FAINT,
    NOTE,
    ORANGE,
    PALE_BLUE,
    PALE_GREEN,
    PALE_GREY,
    PALE_ORANGE,
    PAPER,
    SMALL,
    TEXT,
    TITLE,
    Area,
    Canvas,
)


def row_to_span() -> str:
    """One JSON row, its turns, its tokens with the trained part marked, its place in a span."""
    sample = facts.sample()
    picture = Canvas("One row of the demo's data on its way into a span", 960, 600)
    picture.text(20, 28, "1. One row of examples/demo/about_minilora.json", TITLE)
    picture.box(Area(20, 38, 920, 30), PALE_GREY)
    picture.text(32, 58, json.dumps(sample.row), CODE)

    picture.text(20, 98, "2. Its turns", TITLE)
    x = 20.0
    for role, words in sample.turns:
        shown = f"{role}: {words}"
        area = Area(x, 108, TEXT.width(shown) + 24, 30)
        picture.box(area, PALE_ORANGE if role == "assistant" else PALE_GREY)
        picture.text(x + 12, 128, shown)
        x += area.width + 12

    count, trained = len(sample.tokens), sum(learn for _, _, learn in sample.tokens)
    title = f"3. Its {count} tokens, as template: llama3 writes them; the {trained} orange ones"
    picture.text(20, 170, f"{title} are trained", TITLE)
    _tokens(picture, 180, sample.tokens)
    note = "_ is a blank. A trained token is a target: the position before it has to predict it."
    picture.text(20, 290, note, NOTE)

    place = f"tokens {sample.start} to {sample.start + count - 1} of {len(sample.span.token_ids)}"
    picture.text(20, 326, f"4. Its place in the span of rank {sample.rank}: {place}", TITLE)
    _documents(picture, 336, sample)

    title = "5. What the model gets: at each position a token, and as its label the next token"
    picture.text(20, 456, title, TITLE)
    _labels(picture, 462, sample)
    return picture.svg()


def _shown(words: str) -> str:
    """The text of a token with its blanks visible."""
    return words.replace("\n", "\\n").replace(" ", "_")


def _tokens(picture: Canvas, y: float, tokens: Sequence[tuple[str, int, bool]]) -> None:
    """Boxes in lines, as long as their texts."""
    x = 20.0
    for words, _, learn in tokens:
        width = CODE.width(_shown(words)) + 10
        if x + width > 940:
            x, y = 20, y + 32
        area = Area(x, y, width, 26)
        picture.box(area, PALE_ORANGE if learn else PALE_GREY, ORANGE if learn else FAINT)
        picture.label(area, [_shown(words)], CODE)
        x += width + 4


def _documents(picture: Canvas, y: float, sample: facts.Sample) -> None:
    """The span as a bar of documents, and below it the tiles that they form."""
    scale = 920 / len(sample.span.token_ids)
    at = 0
    for index, tile in enumerate(sample.span.tiles, 1):
        left, right = 22 + at * scale, 18 + (at + sum(tile)) * scale
        picture.line([(left, y + 44), (left, y + 50), (right, y + 50), (right, y + 44)])
        below = Area(left, y + 54, right - left, 36)
        picture.label(below, [f"tile {index}:", f"{sum(tile)} tokens"], SMALL)
        for length in tile:
            area = Area(20 + at * scale, y, length * scale, 40)
            ours = at == sample.start
            picture.box(area, ORANGE if ours else PALE_BLUE)
            picture.label(area, [str(length)], replace(SMALL, bold=ours))
            at += length


def _labels(picture: Canvas, y: float, sample: facts.Sample) -> None:
    """Token and label at the row's start, where its answer begins, and at its end."""
    for row, name in enumerate(("position", "token", "label")):
        picture.text(20, y + 26 + 34 * row, name)
    names = {number: _shown(words) for words, number, _ in sample.tokens}
    ids, labels = sample.span.token_ids.tolist(), sample.span.labels.tolist()
    answer = next(at for at, (_, _, learn) in enumerate(sample.tokens) if learn)
    end = len(sample.tokens)

    x = 128.0
    for group in (range(0, 2), range(answer - 2, answer + 2), range(end - 3, end)):
        for at in group:
            token, target = ids[sample.start + at], labels[sample.start + at]
            label = names[target] if target >= 0 else str(target)
            width = max(CODE.width(names[token]), CODE.width(label), 38) + 10
            position, upper, lower = (Area(x, y + 8 + 34 * row, width, 28) for row in range(3))
            picture.label(position, [str(at)], SMALL)
            picture.box(upper, PALE_GREY, FAINT)
            picture.label(upper, [names[token]], CODE)
            picture.box(lower, PALE_ORANGE if target >= 0 else PAPER, FAINT)
            picture.label(lower, [label], CODE)
            x += width + 4
        x += 26

    none = labels[sample.start]
    note = (
        f"{none} means: no target here. The last token has none: the next document is another text."
    )
    picture.text(20, y + 130, f"Positions begin at 0 in every document. {note}", NOTE)


# What a block does, in its order: the operation, and the tensor that it gives.
OPERATIONS = (
    ("", "input"),
    ("input_layernorm", "normed 1"),
    ("q_proj", "q"),
    ("k_proj", "k"),
    ("v_proj", "v"),
    ("attention", "attended"),
    ("o_proj, + input", "middle"),
    ("post_attention_layernorm", "normed 2"),
    ("gate_proj", "gate"),
    ("up_proj", "up"),
    ("silu(gate) x up", "product"),
    ("down_proj, + middle", "output"),
)
FORWARD, BACKWARD = 372, 640  # where the bars of each direction begin
NUMBER_WIDTH = 180 / 14336


def saved_and_recomputed() -> str:
    """A block's tensors in forward, and again in backward, with what lives how long."""
    job = facts.article()
    sizes = facts.block_tensors(job)
    picture = Canvas("What a block saves, what it recomputes, and what it skips", 960, 556)
    picture.text(20, 28, "One decoder block, for one token of a tile", TITLE)
    picture.text(20, 56, "operation", NOTE)
    picture.text(214, 56, "its output", NOTE)
    picture.text(FORWARD - 20, 56, "numbers", replace(NOTE, anchor="end"))
    picture.text(FORWARD, 56, "forward, without a graph", NOTE)
    picture.text(BACKWARD, 56, "backward: recompute, then gradients", NOTE)

    width = sizes["middle"]  # of the input and the output too
    for index, (operation, name) in enumerate(OPERATIONS):
        _tensor(picture, 64 + 30 * index, (operation, name), sizes.get(name, width))
    bottom = 60 + 30 * len(OPERATIONS)
    for x in (FORWARD - 10, BACKWARD - 10):
        picture.arrow([(x, 66), (x, bottom)])

    saved = sum(sizes.values()) * job.size
    skipped, products = facts.down_proj_share(job)
    lines = [
        f"Green: saved from forward to backward, {width * job.size:,} bytes per token. All else of "
        "forward is freed tile by tile.",
        f"Orange: saved by autograd, {saved:,} bytes per token, but for the tokens of one tile "
        "only; freed with its gradients.",
        f"(Among them LoRA's {sizes['LoRA']} numbers and the {sizes['sum per head']} of the "
        "softmax, too small to draw.)",
        "Dashed: not computed again. Backward of down_proj needs its input and the gradient that "
        "comes in, not its output.",
        f"That saves {skipped:,} of the {products:,} multiplications of a block's recompute.",
    ]
    picture.paragraph(20, bottom + 34, lines)
    return picture.svg()


def _tensor(picture: Canvas, y: float, names: tuple[str, str], elements: int) -> None:
    """One operation: what becomes of its output in forward, and in backward."""
    operation, name = names
    base, width = y + 18, elements * NUMBER_WIDTH
    picture.text(20, base, operation)
    picture.text(214, base, name.rstrip(" 12"))
    picture.text(FORWARD - 20, base, f"{elements:,}", replace(TEXT, anchor="end"))
    before, after = Area(FORWARD, y + 3, width, 22), Area(BACKWARD, y + 3, width, 22)

    if name == "input":
        fates = "saved", "as it was saved"
        picture.box(before, PALE_GREEN)
        picture.box(after, PALE_GREEN)
    elif name == "output":
        fates = "goes to the next block", "skipped"
        picture.box(before, PALE_GREY)
        picture.box(after, PAPER, dashed=True)
    else:
        fates = "freed", "saved for the tile"
        picture.box(before, PALE_GREY)
        picture.box(after, PALE_ORANGE)
    picture.text(FORWARD + width + 8, base, fates[0], NOTE)
    picture.text(BACKWARD + width + 8, base, fates[1], NOTE)
