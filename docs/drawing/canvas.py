"""A picture as SVG text: boxes, words and arrows, the same bytes on every machine.

Widths of words are estimated from above, because every viewer has another font. A word that would
leave the picture, or lie over another word, is an error here and not a surprise on the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from xml.sax.saxutils import escape

INK, SOFT, EDGE, FAINT, PAPER = "#1f2328", "#57606a", "#8c959f", "#d0d7de", "#ffffff"
BLUE, ORANGE, GREEN, PURPLE, GREY = "#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d9d9d"
PALE_BLUE, PALE_ORANGE, PALE_GREEN = "#dbe7f3", "#fde2c5", "#d8ecd5"
PALE_PURPLE, PALE_GREY = "#eddfea", "#eef0f2"

# Widths of characters in DejaVu Sans, the widest of the fonts in use, in hundredths of the font's
# size. Whole numbers, because Python 3.12 adds up floats otherwise than 3.11.
WIDTHS = {"ijlI.,:;'|!": 41, 'ftr()[]-/ "': 47, "mwMW@%+=<>~#&": 100}
CAPITAL, OTHER, MONO = 79, 64, 61
BOLD = 1.13  # times as wide as plain words
LINE = 1.35  # from base line to base line, in sizes of the font

Point = tuple[float, float]


class Area(NamedTuple):
    """A rectangle; x and y are its top left corner, y grows downwards."""

    x: float
    y: float
    width: float
    height: float

    def meets(self, other: Area) -> bool:
        """Whether the two have a point in common."""
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )


@dataclass(frozen=True)
class Style:
    """How words look. anchor: which end of them (start, middle, end) stands at the given place."""

    size: float = 13
    anchor: str = "start"
    bold: bool = False
    mono: bool = False
    colour: str = INK

    def width(self, words: str) -> float:
        """At most so many units wide are the words."""
        if self.mono:
            return MONO * len(words) * self.size / 100
        plain = sum(map(_width, words)) * self.size / 100
        return plain * BOLD if self.bold else plain


TEXT = Style()
TITLE = Style(size=14, bold=True)
SMALL = Style(size=12)
NOTE = Style(size=12, colour=SOFT)
CODE = Style(size=12, mono=True)


def _width(character: str) -> int:
    for characters, width in WIDTHS.items():
        if character in characters:
            return width
    return CAPITAL if character.isupper() else OTHER


def number(value: float) -> str:
    """A coordinate with at most one decimal place."""
    return f"{value:.1f}".removesuffix(".0")


@dataclass
class Canvas:
    """A picture that is being drawn; `title` is what a screen reader says.

    parts: SVG elements, in the order of drawing; words, strokes: where words and lines are.
    """

    title: str
    width: float
    height: float
    parts: list[str] = field(default_factory=list)
    words: list[tuple[Area, str]] = field(default_factory=list)
    strokes: list[Area] = field(default_factory=list)

    def box(self, area: Area, fill: str = PAPER, edge: str = EDGE, *, dashed: bool = False) -> None:
        """A rectangle; an empty `edge` draws none."""
        x, y, width, height = map(number, area)
        line = f' stroke="{edge}"' if edge else ""
        if dashed:
            line += ' stroke-dasharray="4 3"'
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}"{line}/>'
        )

    def text(self, x: float, y: float, words: str, style: Style = TEXT) -> None:
        """Words whose base line is at y. Raises ValueError where they do not fit."""
        width = style.width(words)
        left = x - width * {"start": 0, "middle": 0.5, "end": 1}[style.anchor]
        place = Area(left, y - 0.8 * style.size, width, style.size)
        right, bottom = left + width, place.y + place.height
        if left < 0 or place.y < 0 or right > self.width or bottom > self.height:
            raise ValueError(f"{self.title}: {words!r} leaves the picture, {place}")
        for other, theirs in self.words:
            if place.meets(other):
                raise ValueError(f"{self.title}: {words!r} lies over {theirs!r}")
        self.words.append((place, words))

        looks = f'font-size="{number(style.size)}" fill="{style.colour}"'
        if style.anchor != "start":
            looks += f' text-anchor="{style.anchor}"'
        if style.bold:
            looks += ' font-weight="bold"'
        if style.mono:
            looks += ' font-family="monospace"'
        shown = escape(words)
        self.parts.append(f'<text x="{number(x)}" y="{number(y)}" {looks}>{shown}</text>')

    def paragraph(self, x: float, y: float, lines: Sequence[str], style: Style = TEXT) -> None:
        """Lines one below the other, the first one's base line at y."""
        for index, words in enumerate(lines):
            self.text(x, y + index * LINE * style.size, words, style)

    def label(self, area: Area, lines: Sequence[str], style: Style = TEXT) -> None:
        """Lines of words in the middle of an area. Raises ValueError where they do not fit."""
        self._check_room(area, lines, style)
        style = replace(style, anchor="middle")
        above = (len(lines) - 1) * LINE * style.size / 2 - 0.35 * style.size
        middle = area.x + area.width / 2
        self.paragraph(middle, area.y + area.height / 2 - above, lines, style)

    def titled(self, area: Area, fill: str, name: str, lines: Sequence[str]) -> None:
        """A box with its name and a few lines in its top left corner."""
        self.box(area, fill)
        inside = Area(area.x + 10, area.y + 8, area.width - 18, area.height - 8)
        self._check_room(inside, [name], TITLE)
        self.text(inside.x, inside.y + 14, name, TITLE)
        below = Area(inside.x, inside.y + 22, inside.width, inside.height - 22)
        self._check_room(below, lines, SMALL)
        self.paragraph(below.x, below.y + 12, lines, SMALL)

    def _check_room(self, area: Area, lines: Sequence[str], style: Style) -> None:
        if LINE * style.size * (len(lines) - 1) + style.size > area.height:
            raise ValueError(f"{self.title}: {lines!r} are too many lines for {area}")
        for words in lines:
            if style.width(words) > area.width:
                raise ValueError(f"{self.title}: {words!r} is too wide for {area}")

    def line(self, points: Sequence[Point], colour: str = SOFT, *, dashed: bool = False) -> None:
        """Straight strokes from point to point, each along an axis."""
        for (x, y), (to_x, to_y) in zip(points, points[1:], strict=False):
            across, down = abs(to_x - x), abs(to_y - y)
            self.strokes.append(Area(min(x, to_x), min(y, to_y), across or 1, down or 1))
        path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}/>'
        )

    def arrow(self, points: Sequence[Point], colour: str = SOFT) -> None:
        """A line with a head at its last point."""
        (before_x, before_y), (x, y) = points[-2:]
        right, down = (x > before_x) - (x < before_x), (y > before_y) - (y < before_y)
        back_x, back_y = x - 8 * right, y - 8 * down
        self.line([*points[:-1], (back_x, back_y)], colour)

        corners = [
            (x, y),
            (back_x + 4 * down, back_y + 4 * right),
            (back_x - 4 * down, back_y - 4 * right),
        ]
        path = " ".join(f"{number(x)},{number(y)}" for x, y in corners)
        self.parts.append(f'<polygon points="{path}" fill="{colour}"/>')

    def svg(self) -> str:
        """The whole picture, on paper of its own so that it reads on a dark page too.

        Raises ValueError where a line goes through words.
        """
        for place, words in self.words:
            if any(place.meets(stroke) for stroke in self.strokes):
                raise ValueError(f"{self.title}: a line goes through {words!r}")
        width, height = number(self.width), number(self.height)
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
                f' width="{width}" height="{height}" font-family="sans-serif" role="img">',
                f"<title>{escape(self.title)}</title>",
                f'<rect width="{width}" height="{height}" rx="6" fill="{PAPER}"/>',
                *self.parts,
                "</svg>\n",
            ]
        )
