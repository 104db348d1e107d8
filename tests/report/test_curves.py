"""Pictures of runs: what is read from their logs, and that every curve is where it belongs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from minilora.plot import main
from minilora.report.curves import PANELS, curve, draw_loss, draw_runs, read_log, smooth

COLOURS = ((31, 119, 180), (255, 127, 14))  # matplotlib's C0 and C1


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"current_steps": step, "loss": 5 - step / 10, "lr": 1e-5 * step, "grad_norm": 1.0,
            "throughput": 100.0, "rss_gib": [1.0, 2.0 + step], **more}  # fmt: skip


def write(folder: Path, lines: list[dict[str, Any]], torn: str = "") -> Path:
    folder.mkdir(parents=True)
    text = "".join(json.dumps(one) + "\n" for one in lines) + torn
    (folder / "trainer_log.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_log_lines_that_are_no_steps_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "trainer_log.jsonl"
    lists, digits = b"[" * 100_000, b"9" * 5000
    path.write_bytes(b'{"current_steps": 1, "loss": 2.0}\n[1]\n7\n\n{"loss": 1}\n\xff\n' + lists)
    path.write_bytes(path.read_bytes() + b"\n" + digits + b'\n{"current_steps": 2, "lo')
    assert read_log(path) == [{"current_steps": 1, "loss": 2.0}]
    draw_loss(tmp_path)


def test_steps_that_were_done_again_count_once() -> None:
    lines = [{"current_steps": step, "loss": step} for step in (1, 2, 3, 4, 5)]
    lines += [{"current_steps": 3, "eval_loss": 1}]
    lines += [{"current_steps": step, "loss": 10 * step} for step in (3, 4)]
    assert curve(lines, "loss") == ([1, 2, 3, 4], [1, 2, 30, 40])
    assert curve(lines, "eval_loss") == ([3], [1])


def test_only_numbers_are_drawn_and_of_all_ranks_the_largest() -> None:
    values = [[1.0, 3.0], None, "x", [], float("nan"), float("inf"), 2, ["x", 4]]
    lines = [{"current_steps": step, "m": value} for step, value in enumerate(values)]
    assert curve(lines, "m") == ([0, 6, 7], [3.0, 2, 4])


def test_smooth_keeps_a_straight_line_and_calms_noise() -> None:
    straight = [0.5 * step for step in range(200)]
    assert smooth(straight) == pytest.approx(straight)
    noise = [1.0 if step % 2 else -1.0 for step in range(200)]
    assert max(map(abs, smooth(noise)[10:-10])) < 0.1
    assert smooth([]) == []
    assert smooth([3.0]) == [3.0]


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
        line(step, loss=4.0, lr=2e-5 * step, grad_norm=2.0, throughput=200.0)
        for step in range(1, 30)
    ]
    checked = [{"current_steps": step, "eval_loss": 3.0} for step in (10, 20, 29)]
    first = write(tmp_path / "first", [line(step) for step in range(1, 30)])
    second = write(tmp_path / "second", [*up, *checked], torn='{"current_steps": 30, "lo')
    output = tmp_path / "runs.png"
    assert main([str(first), str(second / "trainer_log.jsonl"), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    both, hidden = {0, 1}, {1}  # the same memory: the second curve hides the first
    assert coloured(output) == [both, {1}, both, both, both, hidden]


def test_panels_that_no_run_has_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_runs({"one": [line(1), line(2)]}, tmp_path / "few.svg")
    text = (tmp_path / "few.svg").read_text(encoding="utf-8")
    named = [name for name in PANELS.values() if f"<!-- {name} -->" in text]
    assert named == [name for key, name in PANELS.items() if key != "eval_loss"]
    assert "<!-- one -->" in text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folders = [str(write(tmp_path / name / "out", [line(1)])) for name in "ab"]
    assert main([*folders, "--output", str(tmp_path / "x.svg")]) == 0
    text = (tmp_path / "x.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {folder} -->" in text for folder in folders)


def test_what_cannot_be_drawn_is_refused_all_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, empty = write(tmp_path / "good", [line(1)]), write(tmp_path / "empty", [])
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
    assert main([str(write(tmp_path / "one", [line(1)]))]) == 2
    assert "pip install 'minilora[plot]'" in capsys.readouterr().err
