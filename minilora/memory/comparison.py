"""A table of the ways to compute a step: the memory of each, and what it moves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from minilora.memory.peak import GIB
from minilora.memory.traffic import Links, received, seconds
from minilora.memory.ways import MARGIN, Way


def comparison(
    compared: Sequence[Way], limit: int, best: Way | None, links: Links, explain: bool
) -> Iterator[str]:
    """A line per file, way and gather_tokens; a column per tile_tokens. best: the recommended one.

    Where a file's way fits with no gather_tokens, only the smallest is shown, or all if explained.
    """
    tiles = sorted({way.job.tile_tokens for way in compared})
    yield "the same step in other ways, GiB per GPU: (does not fit), * recommended"
    tile_names = "".join(f"{f'tile {tile}':>11}" for tile in tiles)
    moved = f"{'gathered':>12}{'seconds':>9}"
    if compared[0].job.machines > 1:
        moved = f"{'within':>12}{'seconds':>9}{'between':>12}{'seconds':>9}"
        yield (
            "within and between machines: what each GPU receives in a step, in seconds at "
            f"{links.within:g} and {links.between:g} Gbit/s"
        )
    yield f"{'deepspeed':<16}{'blocks':<12}{'gather':>7}{tile_names}{moved}"

    for (file, blocks), alike in groupby(compared, lambda way: (way.file, way.blocks)):
        lines: list[str] = []
        any_fits = False
        for gather, row in groupby(alike, lambda way: way.job.gather_tokens):
            by_tile = {way.job.tile_tokens: way for way in row}
            any_fits |= any(way.peak.total <= limit for way in by_tile.values())
            cells = [_cell(by_tile.get(tile), limit, best) for tile in tiles]
            moved = _moved(next(iter(by_tile.values())), links)  # the same for all tiles
            lines.append(f"{file:<16}{blocks:<12}{gather or 'step':>7}{''.join(cells)}{moved}")
        yield from lines if any_fits or explain else lines[-1:]

    if best is None:
        yield f"none is recommended: none leaves {1 - MARGIN:.0%} free"


def _moved(way: Way, links: Links) -> str:
    """The last columns of a line: gigabytes and seconds.

    On one machine: what is gathered, of which this rank has its own part already. On several: what
    is received, gradients too, within a machine and between machines.
    """
    job, gathered = way.job, way.peak.gathered
    if job.machines == 1:
        taken = gathered * (job.ranks - 1) / job.ranks * 8e-9 / links.within
        return f"{gathered / 1e9:>9.1f} GB{taken:>9.1f}"
    pairs = zip(received(job), seconds(job, links), strict=True)
    return "".join(f"{moved / 1e9:>9.1f} GB{taken:>9.1f}" for moved, taken in pairs)


def _cell(way: Way | None, limit: int, best: Way | None) -> str:
    if way is None:  # gather_tokens is less than tile_tokens
        return " " * 11
    gib = f"{way.peak.total / GIB:.2f}"
    if way.peak.total > limit:
        return f"({gib})".rjust(11)
    return (gib + ("*" if way is best else " ")).rjust(11)
