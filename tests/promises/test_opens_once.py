"""A run reads each of its small files once in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.support.runs import Ground, stage_file

# An audit hook sees every open() of Python; the library that reads weights is no concern here.
COUNTING = """
import json, sys
opened = []
sys.addaudithook(lambda name, args: opened.append(str(args[0])) if name == "open" else None)
from minilora import train
code = train.main(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    json.dump(opened, file)
train.leave(code)
"""


def test_a_run_opens_each_small_file_once(ground: Ground, tmp_path: Path) -> None:
    """With two snapshots on the way, each of which holds copies of the tokenizer's files."""
    ds_file = stage_file(ground.folder, 3)
    job = ground.job("opens", "tiny", deepspeed=str(ds_file), max_steps=2, save_steps=1)
    words = [f"--{key}={value}" for key, value in job.items()]
    found = tmp_path / "opened.json"
    done = subprocess.run(
        [sys.executable, "-c", COUNTING, str(found), *words],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr

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
