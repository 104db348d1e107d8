"""Run in a process of its own: one training job, killed with SIGKILL again and again.

python tests/kills.py JOB.json KILLS SEED

Imports are paid once; each attempt is a fork that trains as `minilora.train` does, with saves
slowed down so that kills fall into them too. Prints a line of JSON per attempt.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from minilora import train


def attempt(words: list[str], kill_after: float | None) -> tuple[int, float]:
    """Train in a child; kill it after some seconds unless it ends before. Returns its status."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        sync = os.fsync
        os.fsync = lambda handle: (time.sleep(0.02), sync(handle))[1]  # type: ignore[assignment]
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
    whole = 2.5
    while True:
        kill_after = dice.uniform(0.2, 1.0) * whole if kills > 0 else None
        code, elapsed = attempt(words, kill_after)
        kept = sorted(path.name for path in Path(job["output_dir"]).glob("checkpoint-*"))
        print(json.dumps({"code": code, "seconds": elapsed, "kept": kept}), flush=True)
        if code == 0:
            return
        assert code == -signal.SIGKILL, code
        kills -= 1


if __name__ == "__main__":
    main()
