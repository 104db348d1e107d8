"""Curves of runs: trainer_log.jsonl read back, and drawn."""

from __future__ import annotations

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

LOG = "trainer_log.jsonl"
PICTURE = "training_loss.png"
Lines = Sequence[Mapping[str, Any]]

# The panels of a picture of several runs, by the key of the log or the end of it.
PANELS = {
    "loss": "loss per labelled token",
    "eval_loss": "validation loss per labelled token",
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "throughput": "tokens per second, all ranks",
    "_gib": "peak memory over all ranks, GiB",
}

# The panels whose curves are smoothed.
NOISY = ("loss", "grad_norm", "throughput")

# The panels that start at zero. Their curves are flat, and a scale of its own would make noise look
# like a difference.
FROM_ZERO = ("throughput", "_gib")

# A curve of fewer points than this is drawn with its points, and not smoothed.
FEW = 20


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a trainer_log.jsonl, without one that a killed run left unfinished."""
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
    """Steps, and the values that a key has there; the largest where every rank has one.

    A run that resumed may have repeated steps. They count as they were the last time.
    """
    steps: list[int] = []
    values: list[float] = []
    for line in lines:
        found = line.get(key)
        of_ranks = found if isinstance(found, list) else [found]
        finite = [one for one in of_ranks if isinstance(one, int | float) and abs(one) < math.inf]
        if not finite:
            continue
        while steps and steps[-1] >= line["current_steps"]:
            steps.pop()
            values.pop()
        steps.append(line["current_steps"])
        values.append(max(finite))
    return steps, values


def smooth(values: Sequence[float]) -> list[float]:
    """A moving average over a twentieth of the run, centred, so that it does not lag behind."""
    widest = len(values) // 40 + 1
    last = len(values) - 1
    smoothed = []
    for place in range(len(values)):
        # Towards the ends the window narrows, or it would not be centred.
        reach = min(widest, place, last - place)
        window = values[place - reach : place + reach + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that is not in pyplot's global list.

    Raises ImportError where matplotlib is not installed.
    """
    # Here, because matplotlib is an extra, and slow to import.
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


def label(axes: Axes, x: str, y: str) -> None:
    """Name the axes, in the style of all pictures."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_loss(folder: Path) -> None:
    """Draw training_loss.png from trainer_log.jsonl. Raises ImportError, OSError."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    lines = read_log(folder / LOG)

    steps, losses = curve(lines, "loss")
    points = "o" if len(steps) < FEW else None
    axes.plot(steps, losses, color="#9ecae1", linewidth=1, marker=points, label="as logged")
    axes.plot(steps, smooth(losses), color="#08519c", linewidth=2, label="smoothed")

    steps, losses = curve(lines, "eval_loss")
    if steps:
        axes.plot(steps, losses, color="#d94801", linewidth=1.5, marker="o", label="validation")

    label(axes, "optimizer step", "loss per labelled token")
    axes.set_title(f"Training loss: {folder.resolve().name}")
    axes.legend(frameon=False)
    figure.savefig(folder / PICTURE, dpi=150)


def draw_runs(runs: Mapping[str, Lines], path: Path) -> None:
    """Draw a picture with a panel for each of PANELS that a run has, and a colour for each run.

    Raises ImportError; OSError; ValueError for a kind of file that matplotlib does not write.
    """
    names_in_logs = {name for lines in runs.values() for line in lines for name in line}
    shown = [key for key in PANELS if any(name.endswith(key) for name in names_in_logs)]
    last_step = max(line["current_steps"] for lines in runs.values() for line in lines)
    colours = [f"C{index % 10}" for index in range(len(runs))]

    # At most three panels in a row, and rows of equal length.
    rows = math.ceil(len(shown) / 3)
    columns = math.ceil(len(shown) / rows)
    figure = new_figure(14, 3.6 * rows + 0.5)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(shown) :]:
        axes.set_visible(False)

    for axes, key in zip(panels, shown, strict=False):
        for lines, colour in zip(runs.values(), colours, strict=True):
            _draw(axes, lines, key, colour)
        label(axes, "optimizer step", PANELS[key])
        axes.set_xlim(0, 1.02 * last_step)
        if key in FROM_ZERO:
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])

    handles = [panels[0].plot([], [], color=colour)[0] for colour in colours]
    figure.legend(handles, list(runs), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def _draw(axes: Axes, lines: Lines, key: str, colour: str) -> None:
    """One run's curve in one panel; a noisy one smoothed, over what was logged."""
    if key.startswith("_"):
        # The log has several such figures. The first is the one that tells most.
        key = next((name for line in lines for name in line if name.endswith(key)), key)

    steps, values = curve(lines, key)
    points = "o" if len(steps) < FEW else None
    if key in NOISY and not points:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        values = smooth(values)
    axes.plot(steps, values, color=colour, linewidth=1.6, marker=points, markersize=4)
