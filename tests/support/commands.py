"""What stands in the documentation: its tables, and commands, parsed by their real parsers."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from minilora.__main__ import COMMANDS
from minilora.settings.command_line import read_settings
from minilora.settings.errors import RequestError

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLE = ROOT / "examples" / "llama31_8b_7x4090.yaml"
CHINESE = ".zh-CN.md"
READMES = [ROOT / "README.md", ROOT / f"README{CHINESE}"]
PROMISES = [ROOT / "docs" / "promises.md", ROOT / "docs" / f"promises{CHINESE}"]
SETTINGS = [ROOT / "docs" / "settings.md", ROOT / "docs" / f"settings{CHINESE}"]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
DOCS = [*READMES, CONTRIBUTING, *sorted((ROOT / "docs").glob("*.md"))]
SHELL = ("", "sh", "bash")
COMMAND = re.compile(r"(\w+=\S+ )*(\./run\.sh|minilora|deepspeed|torchrun|hf|python) .*")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def fences(text: str) -> Iterator[tuple[str, str]]:
    """Language and content of each fenced block."""
    for found in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield found[1], found[2]


def spans(text: str) -> list[str]:
    """What stands in backticks outside of fences, as it is shown."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [span.replace("\\|", "|") for span in re.findall(r"`([^`]+)`", prose)]


def tables(text: str) -> Iterator[list[list[str]]]:
    """The cells of each table, row by row: first the header, then the rows below its rule."""
    for found in re.finditer(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        lines = found[0].splitlines()
        # A bar inside a cell is written with a backslash before it.
        cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
        yield [[cell.strip() for cell in row] for row in (cells[0], *cells[2:])]


def fenced_commands(text: str) -> list[str]:
    joined = (body.replace("\\\n", " ") for language, body in fences(text) if language in SHELL)
    lines = (line.split(" #")[0].strip() for body in joined for line in body.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def commands(path: Path) -> list[str]:
    """All commands of a document; those in running text only if they have arguments."""
    inline = [span for span in spans(text_of(path)) if COMMAND.fullmatch(span)]
    names = ("./run.sh train", "./run.sh test")
    return fenced_commands(text_of(path)) + [span for span in inline if span not in names]


def check(command: str) -> None:
    """Parse a command with the parsers that will; fails unless they all accept it."""
    words = shlex.split(command)
    while "=" in words[0]:
        words.pop(0)
    program, *rest = words
    try:
        parse(Path(program).name, rest)
    except (RequestError, SystemExit, OSError, ImportError) as error:
        if getattr(error, "code", 1) != 0:  # --help leaves with 0
            pytest.fail(f"{command}: {error}")


def parse(program: str, words: list[str]) -> None:
    match program, words:
        case ("run.sh", []) | ("run.sh", ["test", *_]):
            pass
        case (("run.sh" | "minilora"), ["train", *rest]):
            launching = importlib.import_module("minilora.launch")._parser()
            parse_module("minilora.train", launching.parse_known_args(rest)[1])
        case "minilora", [command, *rest] if command in COMMANDS:
            parse_module(COMMANDS[command][0], rest)
        case "deepspeed", _:
            runner = importlib.import_module("deepspeed.launcher.runner")
            args = runner.parse_args(words)
            assert args.module, f"{args.user_script}: --module is missing"
            parse_module(args.user_script, args.user_args)
        case "torchrun", _:
            args = importlib.import_module("torch.distributed.run").parse_args(words)
            assert args.module, f"{args.training_script}: -m is missing"
            parse_module(args.training_script, args.training_script_args)
        case "python", ["docs/figures.py"]:
            pass
        case "python", ["-m", module, *rest]:
            parse_module(module, rest)
        case "python", [script]:
            assert script.endswith(".py") and (ROOT / script).is_file(), f"no such file: {script}"
        case "python", ["convert_hf_to_gguf.py", _, "--outfile", _, "--outtype", "bf16"]:
            pass  # llama.cpp's
        case "ollama", ["create", _, "-f", _]:
            pass
        case "source", [".venv/bin/activate"]:
            pass
        case "hf", ["download", _, "--exclude", "original/*", "--local-dir", folder]:
            assert folder == read_settings([str(EXAMPLE)], "train").model.model_name_or_path
        case "hf", ["auth", "login"]:
            pass
        case _:
            pytest.fail(f"nothing is known about: {program} {words}")


def parse_module(module: str, words: list[str]) -> None:
    command = module.removeprefix("minilora.")
    match command:
        case "train":
            read_settings(words, command)
        case "plan":
            assert importlib.import_module(module).main(words) != 2, words
        case "preview":
            read_settings(parser_of(module).parse_known_args(words)[1], command)
        case "generate" | "merge" | "plot":
            parser_of(module).parse_args(words)
        case "tiny":
            assert len(words) == 1, words
        case (
            "benchmarks.speed"
            | "benchmarks.memory"
            | "benchmarks.gpu"
            | "benchmarks.start"
            | "benchmarks.overlap"
            | "benchmarks.leaves"
            | "benchmarks.four_bits"
        ):
            importlib.import_module(module).read(words)
        case _:
            pytest.fail(f"nothing is known about: python -m {module}")


def parser_of(module: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = importlib.import_module(module)._parser()
    return parser
