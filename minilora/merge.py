"""Write a model with its adapter merged in: `python -m minilora.merge --export_dir DIR ...`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from minilora.data.chat import make_template
from minilora.data.tokenizer import load_tokenizer
from minilora.files.adapter import trained_in_bits
from minilora.files.merging import Update, clashes, export_adapter, export_merged, read_updates
from minilora.files.model_card import merged_card
from minilora.files.model_config import read_model_config
from minilora.files.modelfile import modelfile
from minilora.files.weights import check_tied_head, read_checkpoint
from minilora.settings.errors import RequestError, exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 done, 1 something happened, 2 the request is wrong."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Check the whole request, then write.

    Raises RequestError, before anything is written, for a wrong request, and RunError for what
    happens while writing.
    """
    checkpoint = read_checkpoint(read_model_config(args.model_name_or_path))
    check_tied_head(checkpoint)
    adapters = [Path(name) for name in args.adapter_name_or_path.split(",")]

    problems = _folder_problems(args.export_dir)
    if args.ollama and args.adapter_only:
        problems.append("--ollama needs a merged model: leave out --adapter_only")
    if args.template and not args.ollama:
        problems.append("--template is for --ollama: a merged model keeps the base's own")
    serving = _modelfile(args) if args.ollama else None
    weights = [1.0] * len(adapters)
    try:
        if args.adapter_weights is not None:
            weights = _read_weights(args.adapter_weights, len(adapters))
    except RequestError as error:
        problems += error.problems
    updates: dict[str, list[Update]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        try:
            for layer, update in read_updates(adapter, weight, checkpoint.shape).items():
                updates.setdefault(layer, []).append(update)
        except RequestError as error:
            problems += error.problems
    # Whether the adapters go together can be said once each of them has been read.
    problems = problems or clashes(updates)
    if problems:
        raise RequestError(problems)

    card = merged_card(checkpoint.folder, adapters, weights, into_base=not args.adapter_only)
    if args.adapter_only:
        lora = export_adapter(checkpoint, updates, args.export_dir, card)
        print(f"{args.export_dir}: an adapter of rank {lora.rank} and alpha {lora.alpha}")
        print(f"vLLM takes it with --max-lora-rank of at least {lora.rank}")
    else:
        export_merged(checkpoint, updates, args.export_dir, card)
        gigabytes = checkpoint.total_bytes / 1e9
        print(f"{args.export_dir}: {gigabytes:.3f} GB, {len(updates)} layers changed")
        for adapter in adapters:
            if bits := trained_in_bits(adapter):
                print(
                    f"{adapter} was trained beside weights of {bits} bits, and is now merged into "
                    "those of the files, which are more exact: compare answers with "
                    f"minilora.generate --quantization_bit {bits}"
                )
        if serving is not None:
            text, left = serving
            (args.export_dir / "Modelfile").write_text(text, encoding="utf-8")
            print(f"ollama create NAME -f {args.export_dir / 'Modelfile'}", *left, sep="\n")


def _modelfile(args: argparse.Namespace) -> tuple[str, list[str]]:
    """The Modelfile of the merged model, and what it leaves to the user. Raises RequestError."""
    tokenizer = load_tokenizer(args.model_name_or_path)
    if args.template is None and tokenizer.chat_template is None:
        return modelfile(tokenizer, None)
    return modelfile(tokenizer, make_template(args.template, tokenizer))


def _folder_problems(folder: Path) -> list[str]:
    """What is wrong with the folder to write into: nothing that is there may be overwritten."""
    if folder.exists() and not folder.is_dir():
        return [f"--export_dir: {folder} is a file; name a new or empty folder"]
    if folder.exists() and any(folder.iterdir()):
        return [f"--export_dir: {folder} is not empty; name a new or empty folder"]
    return []


def _read_weights(text: str, count: int) -> list[float]:
    """One weight for each of `count` adapters. Raises RequestError."""
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != count or not all(math.isfinite(weight) for weight in weights):
        problem = f"{text!r} is not {count} numbers with commas between them"
        raise RequestError([f"--adapter_weights: {problem}"])
    return weights


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m minilora.merge", allow_abbrev=False)
    parser.add_argument(
        "--model_name_or_path", required=True, type=Path, help="folder of the base model"
    )
    parser.add_argument(
        "--adapter_name_or_path", required=True, help="folder of the adapter; several: DIR,DIR2"
    )
    parser.add_argument(
        "--adapter_weights", help="how much of each adapter, such as 0.5,0.5 [1 each]"
    )
    parser.add_argument(
        "--export_dir", required=True, type=Path, help="new or empty folder to write into"
    )
    parser.add_argument(
        "--adapter_only", action="store_true", help="write one adapter, not a merged model"
    )
    parser.add_argument(
        "--ollama", action="store_true", help="also write a Modelfile, from which Ollama serves it"
    )
    parser.add_argument(
        "--template", help="for --ollama, as in the training: llama3; default: the base's own"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
