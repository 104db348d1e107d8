"""Runs side by side in one picture: `python -m minilora.plot outputs/one outputs/two`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilora.report.curves import LOG, curve, draw_runs, drawing, read_log
from minilora.settings.errors import RequestError, exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 done, 1 the picture cannot be written, 2 the request is wrong."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Read every log, then draw. Raises RequestError with every run that has nothing to draw."""
    lines_by_name: dict[str, list[dict[str, Any]]] = {}
    problems = []
    names = [Path(folder).resolve().name for folder in args.runs]
    for folder, name in zip(args.runs, names, strict=True):
        path = folder / LOG if folder.is_dir() else folder
        try:
            lines = read_log(path)
        except OSError as error:
            problems.append(f"{path}: {str(error.strerror).lower()}")
            continue
        if not curve(lines, "loss")[0]:
            problems.append(f"{path}: no step of a run is logged there")
            continue
        # Runs of one name are told apart by their paths.
        lines_by_name[name if names.count(name) == 1 else str(folder)] = lines
    if problems:
        raise RequestError(problems)

    with drawing("--output", args.output):
        draw_runs(lines_by_name, args.output)
    print(args.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m minilora.plot",
        description="Loss, validation, learning rate, gradient norm, speed and memory of runs.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's output_dir")
    parser.add_argument(
        "--output",
        type=Path,
        default="runs.png",
        metavar="FILE.png",
        help="the picture; a file of this name is overwritten [runs.png]",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
