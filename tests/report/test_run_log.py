"""The report of a run: real files in a real folder, read back by the standard readers."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minilora.report.curves import read_log
from minilora.report.run_log import Report, StepRecord, Totals
from minilora.settings.settings import TrainSettings

# LLaMA-Factory's keys in its order, then ours.
KEYS = [
    "current_steps",
    "total_steps",
    "loss",
    "grad_norm",
    "lr",
    "epoch",
    "percentage",
    "elapsed_time",
    "remaining_time",
    "throughput",
    "total_tokens",
    "gpu_memory_used_gib",
    "gpu_memory_allocated_gib",
]
CLOCK_KEYS = {"elapsed_time", "remaining_time", "throughput"}


def record(step: int) -> StepRecord:
    """A step whose every number depends on the step, so that none can stand for another."""
    return StepRecord(
        step=step,
        epoch=step / 4,
        loss=2 + 1 / (3 * step),
        grad_norm=0.1 * step,
        learning_rate=1e-4 / step,
        labelled=10 * step,
        tokens=100 + step,
        documents=step + 1,
        seconds=0.01 * step,
        memory={"gpu_memory_used_gib": [1.5, 3.5 + step % 8], "gpu_memory_allocated_gib": [2.5]},
    )


def settings(folder: Path, logging_steps: int = 3) -> TrainSettings:
    return TrainSettings(output_dir=str(folder), logging_steps=logging_steps)


def run(report: Report, first: int, last: int) -> None:
    for step in range(first, last + 1):
        report.step(record(step))


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The log without the fields that depend on the clock."""
    return [
        {key: value for key, value in line.items() if key not in CLOCK_KEYS}
        for line in read_log(folder / "trainer_log.jsonl")
    ]


def mean_loss(first: int, last: int) -> float:
    steps = [record(step) for step in range(first, last + 1)]
    return sum(one.loss * one.labelled for one in steps) / sum(one.labelled for one in steps)


def test_log_lines(tmp_path: Path) -> None:
    with Report(settings(tmp_path), 8, True) as report:
        run(report, 1, 7)
        lines = [
            json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()
        ]
        # Written at once, not at the end.
        assert [line["current_steps"] for line in lines] == [3, 6]
        run(report, 8, 8)
    lines = read_log(tmp_path / "trainer_log.jsonl")
    assert [line["current_steps"] for line in lines] == [3, 6, 8]
    for line, first in zip(lines, (1, 4, 7), strict=True):
        last = line["current_steps"]
        assert list(line) == KEYS
        assert line["loss"] == pytest.approx(mean_loss(first, last), rel=1e-14)
        assert line["grad_norm"] == 0.1 * last
        assert line["lr"] == 1e-4 / last
        assert line["epoch"] == last / 4
        assert line["total_steps"] == 8
        assert line["percentage"] == 100 * last / 8
        assert line["total_tokens"] == sum(100 + step for step in range(1, last + 1))
        assert line["gpu_memory_used_gib"] == [1.5, 3.5 + last % 8]
        assert line["gpu_memory_allocated_gib"] == [2.5]
        steps = range(first, last + 1)  # the seconds of the steps alone, whatever lies between
        speed = sum(100 + step for step in steps) / sum(0.01 * step for step in steps)
        assert line["throughput"] == pytest.approx(speed, rel=1e-12)
        assert re.fullmatch(r"\d+:\d\d:\d\d", line["elapsed_time"])
        assert re.fullmatch(r"\d+:\d\d:\d\d", line["remaining_time"])
    assert lines[-1]["remaining_time"] == "0:00:00"


def seconds_of(clock: str) -> int:
    hours, minutes, seconds = map(int, clock.split(":"))
    return 3600 * hours + 60 * minutes + seconds


def test_times_are_seconds(tmp_path: Path) -> None:
    """Of a run that resumes after two steps, which took no time of this run."""
    before = time.monotonic()
    with Report(settings(tmp_path, logging_steps=1), 7, True, Totals(step=2)) as report:
        made = time.monotonic()
        time.sleep(1.05)
        asleep = time.monotonic() - made
        report.step(record(3))
        stepped = time.monotonic() - before
        report.step(record(4))
        report.finish()
    over = time.monotonic() - before

    # However busy the machine is, what is logged lies between two times taken around it.
    first, second = read_log(tmp_path / "trainer_log.jsonl")
    assert int(asleep) <= seconds_of(first["elapsed_time"]) <= int(stepped)
    assert int(4 * asleep) <= seconds_of(first["remaining_time"]) <= int(4 * stepped)
    assert first["throughput"] == pytest.approx(103 / 0.03)  # of the step, not of what came before
    assert second["throughput"] == pytest.approx(104 / 0.04)
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert asleep <= results["train_runtime"] <= over
    assert results["train_samples_per_second"] == pytest.approx(9 / results["train_runtime"])
    assert results["train_steps_per_second"] == pytest.approx(2 / results["train_runtime"])


def test_results(tmp_path: Path) -> None:
    with Report(settings(tmp_path), 8, True) as report:
        run(report, 1, 8)
        report.finish()
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert list(results)[:5] == [
        "epoch",
        "train_loss",
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
    ]
    assert results["epoch"] == 2.0
    assert results["train_loss"] == pytest.approx(mean_loss(1, 8), rel=1e-14)
    assert results["total_tokens"] == 836
    assert results["gpu_memory_used_gib"] == 10.5  # the most of any step, here the seventh


@pytest.mark.parametrize("stop", [1, 3, 4, 6, 7])
def test_resume_leaves_the_log_of_one_run(tmp_path: Path, stop: int) -> None:
    """Killed after step 7, with a snapshot of step `stop`: steps after it stand once."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with Report(settings(whole), 8, True) as report:
        run(report, 1, 8)
        report.finish()
    with Report(settings(parts), 8, True) as report:
        run(report, 1, stop)
        snapshot = json.dumps(vars(report.totals))
        run(report, stop + 1, 7)
    log = parts / "trainer_log.jsonl"
    log.write_text(log.read_text() + '{"current_steps": 8, "lo')
    with Report(settings(parts), 8, True, Totals(**json.loads(snapshot))) as report:
        assert all(line["current_steps"] <= stop for line in timeless(parts))
        run(report, stop + 1, 8)
        report.finish()
    assert timeless(parts) == timeless(whole)
    assert len(log.read_text().splitlines()) == 3
    ours, theirs = (
        json.loads((folder / "train_results.json").read_text()) for folder in (parts, whole)
    )
    assert ours["train_loss"] == theirs["train_loss"]
    assert ours["total_tokens"] == theirs["total_tokens"]
    assert ours["train_steps_per_second"] == pytest.approx((8 - stop) / ours["train_runtime"])


def test_a_fresh_run_starts_a_fresh_log(tmp_path: Path) -> None:
    for _ in range(2):
        with Report(settings(tmp_path), 3, True) as report:
            run(report, 1, 3)
    assert [line["current_steps"] for line in timeless(tmp_path)] == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["trainer_log.jsonl"]


def test_other_ranks_are_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    with Report(settings(folder), 3, False) as report:
        report.message("hello")
        run(report, 1, 3)
        report.finish()
    assert not folder.exists()
    assert capfd.readouterr() == ("", "")


def test_bar_and_messages(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Report(settings(tmp_path), 4, True, Totals(step=1)) as report:
        run(report, 2, 2)
        report.message("in the middle")
        run(report, 3, 4)
        report.finish()
    out, err = capfd.readouterr()
    assert out == ""
    assert "in the middle" in re.split(r"[\r\n]+", err)  # a line of its own
    last = err.rstrip().split("\r")[-1]
    assert "4/4" in last
    assert f"loss {record(4).loss:.4f}" in last
    assert "tok/s, 7.5 GiB" in last


def test_picture(tmp_path: Path) -> None:
    with Report(settings(tmp_path, logging_steps=1), 8, True) as report:
        run(report, 1, 8)
        report.finish()
    image = pytest.importorskip("matplotlib.image").imread(tmp_path / "training_loss.png")
    height, width = image.shape[:2]
    assert (height, width) == (675, 1200)
    curve = image[..., 2] - image[..., 0] > 0.3  # the blue of the smoothed curve
    assert curve.any(axis=0).sum() > width / 2
    columns = curve.any(axis=0).nonzero()[0]
    left, right = curve[:, columns[20]].argmax(), curve[:, columns[-20]].argmax()
    assert right > left + height / 4  # the loss falls from left to right


def test_no_picture_when_not_asked_for(tmp_path: Path) -> None:
    train = TrainSettings(output_dir=str(tmp_path), plot_loss=False)
    with Report(train, 1, True) as report:
        run(report, 1, 1)
        report.finish()
    assert not (tmp_path / "training_loss.png").exists()


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if not installed
    with Report(settings(tmp_path), 1, True) as report:
        run(report, 1, 1)
        report.finish()
    assert "training_loss.png is not drawn: pip install 'minilora[plot]'" in capfd.readouterr().err
    assert (tmp_path / "train_results.json").exists()
    assert not (tmp_path / "training_loss.png").exists()
