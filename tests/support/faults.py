"""Run in a process of its own: training runs to which something happens at a chosen moment.

-m tests.support.faults CASES.json, in a process of the fork server (forked.py). Each rank is a fork
that trains as `minilora.train` does, under a launcher that starts ranks and otherwise leaves them
alone: whoever ends has ended by itself. What happens to a rank is real: a signal, a full disk, a
folder that is gone. Prints a line of JSON per case: exit codes, seconds from the first fault to the
end, and output of each rank.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from minilora import train
from minilora.files import snapshot
from minilora.files.output_folder import claimed
from minilora.processes import world
from minilora.processes.ports import free_port
from minilora.report import run_log
from minilora.training import engine, milestones, same_machines, shared_documents
from tests.support import jobs
from tests.support.forked import launchers_words, rank_words
from tests.support.processes import HANGING_SECONDS

AT_ONCE = 8  # cases; most of their time is waiting
# Moments that a fault can be put before: where the function is looked up, and its name.
MOMENTS: dict[str, tuple[Any, str]] = {
    "start": (train, "read_settings"),
    "links": (world.World, "try_links"),
    "tokenising": (shared_documents, "prepare"),
    "loading": (engine, "read_parts"),
    "step": (engine.Engine, "step"),
    "log": (run_log.Report, "step"),
    "results": (run_log.Report, "finish"),
    "save": (milestones, "write_snapshot"),
    "check": (milestones, "check_adapter"),
    "file of a save": (snapshot, "write_atomically"),
    # What a moment of the memory plan calls first, or it alone. Not our functions: their frames
    # tell the moment.
    "gather": (sys.modules["deepspeed.runtime.zero.partition_parameters"], "_dist_allgather_fn"),
    "forward": (torch.nn.functional, "silu"),
    "loss": (torch.Tensor, "scatter_add_"),
    "recompute": (torch.autograd, "grad"),
    "adam": (torch.optim.AdamW, "step"),
    "reading the adapter": (engine.ds, "safe_get_full_fp32_param"),
}


def inject(fault: dict[str, Any], case: dict[str, Any], marks: Path) -> None:
    """Let the fault happen before the count-th call of its moment."""
    owner, name = MOMENTS[fault["at"]]
    original, left = getattr(owner, name), [fault.get("count", 1)]

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            marks.touch()
            for what in fault["do"]:
                happen(what, Path(case["job"]["output_dir"]))
        return original(*args, **kwargs)

    setattr(owner, name, call)


def happen(what: str, output: Path) -> None:
    word, _, value = what.partition(" ")
    if word == "raise":
        raise ValueError("made by the test")
    if word == "allocate":
        torch.empty(2**50, dtype=torch.uint8)  # an address space has 2**47
    if word == "sleep":
        time.sleep(float(value))
    elif word == "fill":
        with (output / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
    elif word == "read-only":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(output)], check=True)
    elif word == "age":  # as if this machine had an older minilora
        same_machines.__version__ = "0.0"
    elif word == "echo":  # as launchers pass on what the terminal has sent to all already
        subprocess.Popen(["sh", "-c", f"sleep 0.4; kill -TERM {os.getpid()}"])
    elif word == "flip":  # a byte of the newest adapter: the disk keeps something else
        newest = max(
            output.rglob("adapter_model.safetensors"), key=lambda path: path.stat().st_mtime
        )
        data = newest.read_bytes()
        newest.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif word == "share":
        behave_as_a_share()
    elif word == "move":
        output.rename(f"{output}-away")
    else:
        os.kill(os.getpid(), getattr(signal, word))


def behave_as_a_share() -> None:
    """From now on the file system is one that cannot lock, flush folders, or delete what is open.

    What is deleted is gone already every other time, and of the renamings of folders every other
    one finds the folder busy.
    """
    sync, remove, rename = os.fsync, os.rmdir, os.replace
    deletions, renamings = [0], [0]

    def fail(number: int) -> None:
        raise OSError(number, os.strerror(number))

    def sync_files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            fail(errno.EINVAL)
        sync(handle)

    def remove_late(path: Any, **options: Any) -> None:
        deletions[0] += 1
        if deletions[0] % 2:
            fail(errno.EBUSY)
        remove(path, **options)
        fail(errno.ENOENT)

    def rename_late(old: Any, new: Any) -> None:
        renamings[0] += Path(old).is_dir()
        if Path(old).is_dir() and renamings[0] % 2:
            fail(errno.EBUSY)
        rename(old, new)

    fcntl.flock = lambda *_: fail(errno.ENOLCK)
    os.fsync, os.rmdir, os.replace = sync_files_only, remove_late, rename_late


def start_rank(case: dict[str, Any], rank: int, port: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    machines = case.get("machines", [[*range(case["ranks"])]])
    number = next(number for number, ranks in enumerate(machines) if rank in ranks)
    here = machines[number]
    os.environ |= launchers_words(case["ranks"], len(here), port)
    # Torchrun's word for the machine: of two launchers on one computer each is one.
    os.environ |= rank_words(rank, here.index(rank)) | {"GROUP_RANK": str(number)}
    job = case["job"] | case.get("own", {}).get(str(number), {})
    temporary = folder / f"machine {number}"
    temporary.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = str(temporary)
    handle = os.open(folder / f"output-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    world.LINK_SECONDS = case.get("link_seconds", 300)
    for fault in case.get("faults", []):
        if rank in fault["ranks"]:
            inject(fault, case, folder / f"fault-{rank}")
    if rank in case.get("absent", []):
        os._exit(0)
    if "several" in job:  # jobs of one set of processes
        sys.argv = ["jobs.py", job["several"]]
        jobs.main()
    train.leave(train.main([f"--{key}={value}" for key, value in job.items()]))


class Running:
    """A case under way."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case = case
        self.folder = Path(sys.argv[1]).with_name(f"faults {case['name']}")
        self.folder.mkdir()
        stops = [fault["ranks"] for fault in case["faults"] if "SIGSTOP" in fault["do"]]
        self.stopped = {rank for ranks in stops for rank in ranks}
        port = free_port()
        self.claim = ExitStack()
        if case.get("claimed"):
            self.claim.enter_context(claimed(Path(case["job"]["output_dir"])))
        ranks = range(case["ranks"])
        self.ranks = [start_rank(case, rank, port, self.folder) for rank in ranks]
        self.ends: dict[int, tuple[int, float]] = {}
        self.deadline = time.monotonic() + HANGING_SECONDS

    def is_over(self) -> bool:
        """Reap; what hangs too long is killed, and so are stopped ranks once the others ended."""
        running = set(range(len(self.ranks))) - self.ends.keys()
        for rank, child in enumerate(self.ranks):
            if rank not in self.ends:
                if running <= self.stopped or time.monotonic() > self.deadline:
                    os.kill(child, signal.SIGKILL)
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    self.ends[rank] = (os.waitstatus_to_exitcode(status), time.time())
        return len(self.ends) == len(self.ranks)

    def result(self) -> dict[str, Any]:
        self.claim.close()
        ends = [self.ends[rank] for rank in range(len(self.ranks))]
        first = min((path.stat().st_mtime for path in self.folder.glob("fault-*")), default=0.0)
        outputs = [self.folder / f"output-{rank}" for rank in range(len(self.ranks))]
        return {
            "name": self.case["name"],
            "codes": [code for code, _ in ends],
            "seconds": [end - first for _, end in ends],
            "outputs": [path.read_text(encoding="utf-8") for path in outputs],
            "left": sorted(path.name for path in self.folder.rglob("minilora-*")),
        }


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    running: list[Running] = []
    while cases or running:
        while cases and len(running) < AT_ONCE:
            running.append(Running(cases.pop(0)))
        for one in [one for one in running if one.is_over()]:
            running.remove(one)
            print(json.dumps(one.result()), flush=True)
        time.sleep(0.02)


if __name__ == "__main__":
    main()
