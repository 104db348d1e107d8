"""A run reads each of its small files once in every process."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from tests.support.processes import Launch
from tests.support.runs import Ground, stage_file


def test_a_run_opens_each_small_file_once(ground: Ground, tmp_path: Path, launch: Launch) -> None:
    """With two snapshots on the way, each of which holds copies of the tokenizer's files."""
    ds_file = stage_file(ground.folder, 3)
    job = ground.job("opens", "tiny", deepspeed=str(ds_file), max_steps=2, save_steps=1)
    words = [f"--{key}={value}" for key, value in job.items()]
    found = tmp_path / "opened.json"
    code, output = launch(1, ["-m", "tests.support.opened", found, *words], with_="alone")
    assert code == 0, output

    model = ground.models["tiny"]
    counts = Counter(json.loads(found.read_text()))
    for path in (
        model / "config.json",
        model / "tokenizer.json",
        model / "tokenizer_config.json",
        model / "generation_config.json",
        ds_file,
    ):
        assert counts[str(path)] == 1, (path.name, counts[str(path)])
    written = Path(job["output_dir"]) / "checkpoint-2" / "tokenizer_config.json"
    assert written.read_bytes() == (model / "tokenizer_config.json").read_bytes()
