"""Curves of runs: what is read from their logs, and which panels are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from minilora.report.curves import PANELS, curve, draw_loss, draw_runs, read_log, smooth
from tests.support.logs import log_line


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


def test_panels_that_no_run_has_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_runs({"one": [log_line(1), log_line(2)]}, tmp_path / "few.svg")
    text = (tmp_path / "few.svg").read_text(encoding="utf-8")
    named = [name for name in PANELS.values() if f"<!-- {name} -->" in text]
    assert named == [name for key, name in PANELS.items() if key != "eval_loss"]
    assert "<!-- one -->" in text
