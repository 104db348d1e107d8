"""`minilora.plot`: every curve is where it belongs, and what cannot be drawn is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from minilora.plot import main
from tests.support.logs import log_line, write_log

COLOURS = ((31, 119, 180), (255, 127, 14))  # matplotlib's C0 and C1


def coloured(path: Path) -> list[set[int]]:
    """For each of 2 x 3 panels, which of the two runs' colours it shows."""
    image = pytest.importorskip("matplotlib.image").imread(path)[..., :3] * 255
    image = image[image.shape[0] // 12 :]  # without the names of the runs
    height, width = (size // part for size, part in zip(image.shape, (2, 3), strict=False))
    panels = [
        image[row * height : (row + 1) * height, column * width : (column + 1) * width]
        for row in range(2)
        for column in range(3)
    ]
    return [
        {run for run, colour in enumerate(COLOURS)
         if (abs(panel - list(colour)).max(axis=-1) < 12).sum() > 20}
        for panel in panels
    ]  # fmt: skip


def test_every_run_is_in_every_panel_that_it_has_numbers_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    up = [
        log_line(step, loss=4.0, lr=2e-5 * step, grad_norm=2.0, throughput=200.0)
        for step in range(1, 30)
    ]
    checked = [{"current_steps": step, "eval_loss": 3.0} for step in (10, 20, 29)]
    first = write_log(tmp_path / "first", [log_line(step) for step in range(1, 30)])
    second = write_log(tmp_path / "second", [*up, *checked], torn='{"current_steps": 30, "lo')
    output = tmp_path / "runs.png"
    assert main([str(first), str(second / "trainer_log.jsonl"), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    both, hidden = {0, 1}, {1}  # the same memory: the second curve hides the first
    assert coloured(output) == [both, {1}, both, both, both, hidden]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folders = [str(write_log(tmp_path / name / "out", [log_line(1)])) for name in "ab"]
    assert main([*folders, "--output", str(tmp_path / "x.svg")]) == 0
    text = (tmp_path / "x.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {folder} -->" in text for folder in folders)


def test_what_cannot_be_drawn_is_refused_all_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, empty = write_log(tmp_path / "good", [log_line(1)]), write_log(tmp_path / "empty", [])
    assert main([str(good), str(empty), str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {empty}/trainer_log.jsonl: no step of a run is logged there",
        f"error: {tmp_path}/none: no such file or directory",
    ]
    pytest.importorskip("matplotlib")
    assert main([str(good), "--output", str(tmp_path / "x.foo")]) == 2
    assert "--output" in capsys.readouterr().err
    assert main([str(good), "--output", str(tmp_path / "none" / "x.png")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if not installed
    assert main([str(write_log(tmp_path / "one", [log_line(1)]))]) == 2
    assert "pip install 'minilora[plot]'" in capsys.readouterr().err
