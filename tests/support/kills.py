"""Run in a process of its own: one training job, killed with SIGKILL again and again.

python tests/support/kills.py JOB.json KILLS SEED

Imports are paid once; each attempt is a fork that trains as `minilora.train` does. Those that are
going to be killed save slowly: kills fall into saves, and no attempt gets further than two steps.
Prints a line of JSON per attempt.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import minilora.training.run  # noqa: F401 (torch and DeepSpeed, once and not in each attempt)
from minilora import train

LONGEST = 2.5  # seconds until an attempt is killed; a second of them is the start
PAUSE = 0.1  # seconds before each of the nine files of a snapshot is flushed


def attempt(words: list[str], kill_after: float | None) -> tuple[int, float]:
    """Train in a child; kill it after some seconds unless it ends before. Returns its status."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        sync, pause = os.fsync, 0.0 if kill_after is None else PAUSE
        os.fsync = lambda handle: (time.sleep(pause), sync(handle))[1]  # type: ignore[assignment]
        train.leave(train.main(words))
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        elapsed = time.monotonic() - started
        if ended:
            return os.waitstatus_to_exitcode(status), elapsed
        if kill_after is not None and elapsed > kill_after:
            os.kill(child, signal.SIGKILL)
            kill_after = None
        time.sleep(0.002)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    words = [f"--{key}={value}" for key, value in job.items()]
    kills, dice = int(sys.argv[2]), random.Random(int(sys.argv[3]))
    while True:
        kill_after = dice.uniform(0.2, 1.0) * LONGEST if kills > 0 else None
        code, elapsed = attempt(words, kill_after)
        kept = sorted(path.name for path in Path(job["output_dir"]).glob("checkpoint-*"))
        print(json.dumps({"code": code, "seconds": elapsed, "kept": kept}), flush=True)
        if code == 0:
            return
        assert code == -signal.SIGKILL, code
        kills -= 1


if __name__ == "__main__":
    main()
