"""Logs of made-up runs, for the tests of pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def log_line(step: int, **more: Any) -> dict[str, Any]:
    """A line of a log with every figure, or others."""
    return {"current_steps": step, "loss": 5 - step / 10, "lr": 1e-5 * step, "grad_norm": 1.0,
            "throughput": 100.0, "rss_gib": [1.0, 2.0 + step], **more}  # fmt: skip


def write_log(folder: Path, lines: list[dict[str, Any]], torn: str = "") -> Path:
    """A run's folder with a log of these lines, and what a dying run wrote last."""
    folder.mkdir(parents=True)
    text = "".join(json.dumps(one) + "\n" for one in lines) + torn
    (folder / "trainer_log.jsonl").write_text(text, encoding="utf-8")
    return folder
