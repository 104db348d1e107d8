"""Draw the figures of docs/how-it-works.md: `python docs/figures.py` writes docs/figures/*.svg.

Every number in them comes from the package, by drawing/facts.py. The same code gives the same bytes
on every machine; tests/project/test_figures.py compares them with the files that are there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from drawing import memory, steps, weights

FOLDER = Path(__file__).resolve().parent / "figures"
# In the order in which the page shows them.
FIGURES: dict[str, Callable[[], str]] = {
    "four-parts": memory.four_parts,
    "nested-boxes": memory.nested_boxes,
    "row-to-span": steps.row_to_span,
    "gathers-over-time": memory.gathers_over_time,
    "saved-and-recomputed": steps.saved_and_recomputed,
    "one-weight": weights.one_weight,
    "one-lora-b": weights.one_lora_b,
}


def draw() -> dict[str, str]:
    """All figures by their file's name."""
    return {f"{name}.svg": figure() for name, figure in FIGURES.items()}


def main() -> int:
    """Write them all. Returns 0."""
    FOLDER.mkdir(exist_ok=True)
    for name, svg in draw().items():
        (FOLDER / name).write_text(svg, encoding="ascii", newline="\n")
        print(f"docs/figures/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
