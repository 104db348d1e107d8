"""Run in a process of its own: one training job, killed with SIGKILL again and again.

-m tests.support.kills JOB.json KILLS SEED, in a process of the fork server (forked.py). Each
attempt is a fork that trains as `minilora.train` does. It is killed at a change that it is about to
make in its folder: the first, the second, ... or the MOST-th, by the dice. So no kill depends on
how fast the machine is. Prints a line of JSON per attempt.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from minilora import train

# Python announces these before it does them. Files of other folders do not count.
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
WRITES = os.O_WRONLY | os.O_RDWR
# The changes of two steps with a snapshot each, 18 and 18, so that no attempt gets further.
MOST = 36


def kill_at(count: int, folder: str) -> None:
    """Kill this process when it is about to make the count-th change in the folder."""
    left = [count]

    def before(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or (event == "open" and not arguments[2] & WRITES):
            return
        path = arguments[0]
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(folder):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(before)


def attempt(words: list[str], kill: int | None, folder: str) -> int:
    """Train in a child, which is killed at its `kill`-th change. Returns its exit code."""
    child = os.fork()
    if child == 0:
        if kill is not None:
            kill_at(kill, folder)
        train.leave(train.main(words))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    words = [f"--{key}={value}" for key, value in job.items()]
    kills, dice = int(sys.argv[2]), random.Random(int(sys.argv[3]))
    while True:
        kill = dice.randint(1, MOST) if kills > 0 else None
        code = attempt(words, kill, job["output_dir"])
        kept = sorted(path.name for path in Path(job["output_dir"]).glob("checkpoint-*"))
        print(json.dumps({"code": code, "kill": kill, "kept": kept}), flush=True)
        if code == 0:
            return
        assert code == -signal.SIGKILL, code
        kills -= 1


if __name__ == "__main__":
    main()
