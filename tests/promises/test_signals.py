"""Real launchers, asked to stop: every process ends, and the step that was done is saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
import pytest

from minilora.files.snapshot import PREFIX, read_state
from tests.support.processes import HANGING_SECONDS, command_line
from tests.support.runs import Ground, log, stage_file


def parents() -> dict[int, int]:
    """Every process that runs, and its parent."""
    ended = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return {
        process.pid: process.info["ppid"]
        for process in psutil.process_iter(["ppid", "status"])
        if process.info["status"] not in ended
    }


@dataclass
class Launched:
    """A run under a launcher, which process to signal, and what the launcher must then return."""

    job: dict[str, object]
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    target: str
    code: int
    number: signal.Signals

    def below(self) -> list[int]:
        """The launcher and all its processes, ranks last."""
        family = [self.process.pid]
        tree = parents()
        for member in family:  # which grows meanwhile
            family += [child for child, parent in tree.items() if parent == member]
        return family


ENDS = {
    "minilora train": ("minilora", "launcher", -signal.SIGTERM, signal.SIGTERM),
    "deepspeed, a rank": ("deepspeed", "rank", 128 + signal.SIGTERM, signal.SIGTERM),
    "torchrun": ("torchrun", "launcher", 1, signal.SIGTERM),
    "torchrun, its terminal gone": ("torchrun", "launcher", 1, signal.SIGHUP),
    "nobody reads": ("python", "launcher", 128 + signal.SIGHUP, signal.SIGHUP),
}


def as_in_a_terminal() -> None:
    """What ignores a signal hands that on to all it starts, as nohup does with SIGHUP."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def run(request: pytest.FixtureRequest, ground: Ground) -> Iterator[Launched]:
    """A run without an end."""
    launcher, target, code, number = ENDS[request.param]
    # Snapshots of adapters alone, but for the one of a signal: it is there to go on from.
    changes = {"max_steps": 10**6, "save_steps": 10**6, "per_device_train_batch_size": 1,
               "save_only_model": True, "deepspeed": str(stage_file(ground.folder, 3))}  # fmt: skip
    job = ground.job(f"signal-{launcher}-{target}-{number}", "tiny", **changes)
    words = ["-m", "minilora.train", *(f"--{key}={value}" for key, value in job.items())]
    output = tempfile.TemporaryFile()
    ranks, writes = (1, subprocess.PIPE) if launcher == "python" else (2, output)
    command = command_line(launcher, ranks, words)
    process = subprocess.Popen(
        command, stdout=writes, stderr=subprocess.STDOUT, preexec_fn=as_in_a_terminal
    )
    launched = Launched(job, process, output, target, code, number)
    yield launched
    for member in launched.below():
        if process.poll() is None:
            os.kill(member, signal.SIGKILL)


@pytest.mark.parametrize("run", ENDS, indirect=True)
def test_a_signal_saves_and_leaves_no_process(run: Launched) -> None:
    folder = Path(str(run.job["output_dir"]))
    deadline = time.monotonic() + HANGING_SECONDS
    while not (folder / "trainer_log.jsonl").exists() or len(log(run.job, "loss")) < 2:
        assert run.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)

    family = run.below()
    if run.process.stdout is None:
        assert len(family) >= 3
    else:
        run.process.stdout.close()  # as Ctrl-C ends the `tee` behind a pipe
    os.kill(family[0] if run.target == "launcher" else family[-1], run.number)

    deadline = time.monotonic() + HANGING_SECONDS
    while set(family) & parents().keys():
        assert time.monotonic() < deadline, "a process is left"
        run.process.poll()
        time.sleep(0.1)

    assert run.process.wait() == run.code
    (saved,) = folder.glob(f"{PREFIX}*")
    step = read_state(saved).step
    assert log(run.job, "current_steps") == list(range(1, step + 1))
    if run.process.stdout is not None:
        return
    run.output.seek(0)
    output = run.output.read().decode()
    assert output.count("error: ") == 1
    name = run.number.name
    assert f"error: {name}: stopped after step {step}; the last snapshot is {saved}" in output


# Python imports this file when it starts. It signals the process when a module is about to be
# imported, so the moment does not depend on how fast the machine is.
SIGNAL_DURING_IMPORTS = """
import os, signal, sys

class Signal:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Signal())
"""


@pytest.mark.parametrize("name", ["torch", "torch._C", "deepspeed.runtime.engine"])
def test_a_signal_while_libraries_are_imported_ends_the_process_at_once(
    tmp_path: Path, name: str
) -> None:
    """Raised in the C code of an import it would be printed, swallowed, or waited for."""
    text = SIGNAL_DURING_IMPORTS.format(name=name)
    (tmp_path / "sitecustomize.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "minilora.train", "--model_name_or_path=nowhere"]
    command += ["--dataset=rows.json", "--output_dir=out"]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        command,
        env={**os.environ, "RANK": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, b"")
