"""Settings files for the tests of settings: one that is complete, and what is wrong with others."""

from __future__ import annotations

from pathlib import Path

import pytest

from minilora.settings.command_line import read_settings
from minilora.settings.errors import RequestError
from minilora.settings.settings import Settings

NEEDED = "model_name_or_path: base\ndataset: rows.json\noutput_dir: out\n"


def read(tmp_path: Path, text: str, *argv: str, name: str = "run.yaml") -> Settings:
    """The settings of a file with this text, and of these arguments after it."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_settings([str(tmp_path / name), *argv], "train")


def problems_of(tmp_path: Path, text: str, *argv: str, name: str = "run.yaml") -> tuple[str, ...]:
    """Why such a file with these arguments is refused."""
    with pytest.raises(RequestError) as caught:
        read(tmp_path, text, *argv, name=name)
    return caught.value.problems


def check_line_of_a_file(tmp_path: Path, line: str, message: str) -> None:
    """The line is refused, with its key, its place and the message."""
    key = line.split(":")[0]
    needed = [other for other in NEEDED.splitlines() if not other.startswith(f"{key}:")]
    (problem,) = problems_of(tmp_path, "\n".join([*needed, line]))
    assert problem.startswith(f"{key} ({tmp_path / 'run.yaml'}:{len(needed) + 1})")
    assert message in problem


def check_argument(tmp_path: Path, line: str, message: str) -> None:
    """The same on the command line."""
    key, _, value = line.partition(": ")
    (problem,) = problems_of(tmp_path, NEEDED, f"--{key}={value}")
    assert problem.startswith(f"{key} (command line)")
    assert message in problem


def plain(lines: dict[str, str]) -> list[str]:
    """The lines whose value is written the same on the command line: no YAML list or quotes."""
    return [line for line in lines if line[-1] not in "}]'\"" and "-rank" not in line]
