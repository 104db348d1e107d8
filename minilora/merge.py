"""Write a model with its adapter merged in: `python -m minilora.merge --export_dir DIR ...`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from minilora.files.merging import Update, clashes, export_adapter, export_merged, read_updates
from minilora.files.model_config import read_model_config
from minilora.files.weights import read_checkpoint
from minilora.settings.errors import RequestError, exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 done, 1 something happened, 2 the request is wrong."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Check everything, then write. Raises RequestError before anything is written; RunError."""
    checkpoint = read_checkpoint(read_model_config(args.model_name_or_path))
    adapters = [Path(name) for name in args.adapter_name_or_path.split(",")]
    problems = _folder_problems(args.export_dir)
    weights = _weights(args.adapter_weights, len(adapters), problems)
    updates: dict[str, list[Update]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        try:
            for layer, update in read_updates(adapter, weight, checkpoint.shape).items():
                updates.setdefault(layer, []).append(update)
        except RequestError as error:
            problems += error.problems
    if problems := problems or clashes(updates):
        raise RequestError(problems)
    if args.adapter_only:
        lora = export_adapter(checkpoint, updates, args.export_dir)
        print(f"{args.export_dir}: an adapter of rank {lora.rank} and alpha {lora.alpha}")
        print(f"vLLM takes it with --max-lora-rank of at least {lora.rank}")
    else:
        export_merged(checkpoint, updates, args.export_dir)
        print(f"{args.export_dir}: {checkpoint.total_bytes / 1e9:.3f} GB, "
              f"{len(updates)} layers changed")  # fmt: skip


def _folder_problems(folder: Path) -> list[str]:
    if folder.exists() and not folder.is_dir():
        return [f"--export_dir: {folder} is a file; name a new or empty folder"]
    if folder.exists() and any(folder.iterdir()):
        return [f"--export_dir: {folder} is not empty; name a new or empty folder"]
    return []


def _weights(text: str | None, count: int, problems: list[str]) -> list[float]:
    """One weight per adapter: 1 each, or the numbers of --adapter_weights."""
    if text is None:
        return [1.0] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) == count and all(map(math.isfinite, weights)):
        return weights
    problems.append(f"--adapter_weights: {text!r} is not {count} numbers with commas between them")
    return [1.0] * count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m minilora.merge", allow_abbrev=False)
    add = parser.add_argument
    add("--model_name_or_path", required=True, type=Path, help="folder of the base model")
    add("--adapter_name_or_path", required=True, help="folder of the adapter; several: DIR,DIR2")
    add("--adapter_weights", help="how much of each adapter, such as 0.5,0.5 [1 each]")
    add("--export_dir", required=True, type=Path, help="new or empty folder to write into")
    add("--adapter_only", action="store_true", help="write one adapter, not a merged model")
    return parser


if __name__ == "__main__":
    sys.exit(main())
