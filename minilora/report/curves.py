"""Curves of runs: trainer_log.jsonl read back, and drawn."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora.settings.errors import RequestError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG, PICTURE = "trainer_log.jsonl", "training_loss.png"
Lines = Sequence[Mapping[str, Any]]

PANELS = {
    "loss": "loss per labelled token",
    "eval_loss": "validation loss per labelled token",
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "throughput": "tokens per second, all ranks",
    "_gib": "memory of the fullest rank, GiB",
}
NOISY = ("loss", "grad_norm", "throughput")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a trainer_log.jsonl; one that a dying run left unfinished is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("current_steps"), int):
            lines.append(line)
    return lines


def curve(lines: Lines, key: str) -> tuple[list[int], list[float]]:
    """Steps, and the numbers that a key has there; the largest where there is one of each rank.

    Steps that were done again, since a run was gone on with, count as they were the last time.
    """
    steps: list[int] = []
    values: list[float] = []
    for line in lines:
        found = line.get(key)
        numbers = [one for one in (found if isinstance(found, list) else [found])
                   if isinstance(one, int | float) and abs(one) < math.inf]  # fmt: skip
        if numbers:
            while steps and steps[-1] >= line["current_steps"]:
                steps.pop()
                values.pop()
            steps.append(line["current_steps"])
            values.append(max(numbers))
    return steps, values


def smooth(values: Sequence[float]) -> list[float]:
    """A moving average over a twentieth of the run, centred, so that it does not lag behind."""
    widest, last = len(values) // 40 + 1, len(values) - 1
    smoothed = []
    for place in range(len(values)):
        reach = min(widest, place, last - place)
        window = values[place - reach : place + reach + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches, that no global state knows of.

    Raises ImportError where matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def drawing(option: str, path: str | Path) -> Iterator[None]:
    """Raise RequestError if what is drawn inside needs matplotlib, or cannot be such a file."""
    try:
        yield
    except ImportError:
        raise RequestError([f"{option} needs matplotlib: pip install 'minilora[plot]'"]) from None
    except ValueError as error:
        raise RequestError([f"{option}: {path}: {error}"]) from None


def label(axes: "Axes", x: str, y: str) -> None:
    """Name the axes, in the style of all pictures."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_loss(folder: Path) -> None:
    """Draw training_loss.png from trainer_log.jsonl. Raises ImportError, OSError."""
    figure, lines = new_figure(8, 4.5), read_log(folder / LOG)
    axes = figure.subplots()
    steps, losses = curve(lines, "loss")
    few = "o" if len(steps) < 20 else None
    axes.plot(steps, losses, color="#9ecae1", linewidth=1, marker=few, label="as logged")
    axes.plot(steps, smooth(losses), color="#08519c", linewidth=2, label="smoothed")
    checked = curve(lines, "eval_loss")
    if checked[0]:
        axes.plot(*checked, color="#d94801", linewidth=1.5, marker="o", label="validation")
    label(axes, "optimizer step", "loss per labelled token")
    axes.set_title(f"Training loss: {folder.resolve().name}")
    axes.legend(frameon=False)
    figure.savefig(folder / PICTURE, dpi=150)


def draw_runs(runs: Mapping[str, Lines], path: Path) -> None:
    """Draw a picture with a panel for each of PANELS that a run has, and a colour for each run.

    Raises ImportError; OSError; ValueError for a kind of file that matplotlib does not write.
    """
    keys = {line_key for lines in runs.values() for line in lines for line_key in line}
    shown = [key for key in PANELS if any(name.endswith(key) for name in keys)]
    rows = -(-len(shown) // 3)
    figure = new_figure(14, 3.6 * rows + 0.5)
    grid = figure.subplots(rows, -(-len(shown) // rows), squeeze=False).flatten()
    last = max(line["current_steps"] for lines in runs.values() for line in lines)
    for axes, key in zip(grid, shown, strict=False):
        for index, lines in enumerate(runs.values()):
            _draw(axes, lines, key, f"C{index % 10}")
        label(axes, "optimizer step", PANELS[key])
        axes.set_xlim(0, 1.02 * last)
        if key in ("throughput", "_gib"):
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # else noise looks like a difference
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    handles = [grid[0].plot([], [], color=f"C{index % 10}")[0] for index in range(len(runs))]
    figure.legend(handles, list(runs), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def _draw(axes: "Axes", lines: Lines, key: str, colour: str) -> None:
    """One run's curve in one panel; a noisy one smoothed, over what was logged."""
    if key.startswith("_"):  # of several figures the first, which is the most telling one
        key = next((name for line in lines for name in line if name.endswith(key)), key)
    steps, values = curve(lines, key)
    few = "o" if len(steps) < 20 else None
    if key in NOISY and not few:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        values = smooth(values)
    axes.plot(steps, values, color=colour, linewidth=1.6, marker=few, markersize=4)
