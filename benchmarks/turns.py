"""Steps in turns: every variant is alive in its own processes, and one at a time may step.

So what a shared machine does to one variant it does to all, and ratios hold.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
KEY = b"turns"
# Seconds for a variant to start, or to step.
PATIENCE = float(os.environ.get("BENCHMARK_PATIENCE", "300"))


@dataclass(frozen=True)
class Variant:
    """One thing to measure.

    system: trainer, bare, minilora or matmul. stage: of ZeRO, None without DeepSpeed. file: the
    DeepSpeed file, `llama_factory` or `scaled`, which is ours with its limits at this size.
    simulated: ranks that torch's fake process group plays, 0 for real processes. recompute: of the
    peers. keep: the share of minilora's blocks that keep their activations, None for what fits;
    so is tile_tokens. bits: of the frozen weights, 4 or None; the peer then needs bitsandbytes.
    """

    name: str
    system: str
    workload: str = "equal"
    ranks: int = 1
    recompute: bool = True
    stage: int = 0
    file: str = "scaled"
    tile_tokens: int | None = None
    gather_tokens: int | None = None
    packing: bool = False
    simulated: int = 0
    keep: float | None = None
    bits: int | None = None

    @property
    def world(self) -> int:
        return self.simulated or self.ranks


@dataclass(frozen=True)
class Order:
    """What a process is told to do: a variant, on what, for how many steps, and whom to tell."""

    variant: Variant
    size: str
    device: str
    steps: int
    address: str
    folder: str
    launched: float

    @classmethod
    def read(cls, path: str) -> Order:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{**fields, "variant": Variant(**fields["variant"])})


class Turns:
    """A variant's side: reports each step and waits for the next turn, on all ranks alike."""

    def __init__(self, order: Order) -> None:
        self.order, self.done = order, 0
        self.rank = int(os.environ.get("RANK", "0"))
        self.counted = {"bytes": 0, "calls": 0}
        self.marks: dict[str, float] = {}
        self.tokens: list[int] = []
        self._start = order.launched - time.time() + time.monotonic()
        self._connection: Connection | None = None
        if self.rank == 0:
            self._connection = Client(order.address, authkey=KEY)

    def mark(self, phase: str) -> None:
        """The end of a phase of the start, in seconds since the launch."""
        self.marks[phase] = time.monotonic() - self._start

    def step_done(self, loss: float, gradients: Callable[[], Mapping[str, Tensor]]) -> None:
        """End of an optimizer step. Collective. `gradients`: by name, asked for once."""
        self._together()
        seconds = time.monotonic() - self._start
        news: dict[str, Any] = {"seconds": seconds, "loss": loss, **self.counted}
        if self.done == 0:
            path = Path(self.order.folder) / f"{self.order.variant.name}.pt"
            found = {name: tensor.cpu() for name, tensor in gradients().items()}
            if self.rank == 0:
                torch.save(found, path)
            news |= {"gradients": str(path), "marks": self.marks}
        self.done += 1
        self.wait({**news, **_memory()})
        if self.done == self.order.steps:
            sys.stdout.flush()
            os._exit(0)

    def wait(self, news: dict[str, Any]) -> None:
        """Tell the news and wait for the next turn. Collective."""
        if self._connection:
            self._connection.send(news)
            self._connection.recv()
        self._together()
        self.counted.update(bytes=0, calls=0)
        self._start = time.monotonic()

    def _together(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()


def _memory() -> dict[str, float]:
    import resource

    found = {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}
    if torch.cuda.is_available():
        found["allocated"] = float(torch.cuda.max_memory_allocated())
        found["reserved"] = float(torch.cuda.max_memory_reserved())
    return found


@dataclass
class Player:
    """The parent's side of a variant: its processes, and the news of each of its steps."""

    variant: Variant
    process: subprocess.Popen[bytes]
    connection: Connection
    log: Path
    news: list[dict[str, Any]] = field(default_factory=list)

    def hear(self) -> None:
        """Take the news of a step, or fail with what the processes printed."""
        if not self.connection.poll(PATIENCE):
            raise RuntimeError(f"{self.variant.name} is silent:\n{self._tail()}")
        try:
            self.news.append(self.connection.recv())
        except (EOFError, OSError):
            raise RuntimeError(f"{self.variant.name} ended:\n{self._tail()}") from None

    def step(self) -> None:
        self.connection.send("go")
        self.hear()

    def stop(self, finished: bool) -> None:
        """Let it end, or end it in the middle of its steps."""
        if finished:
            self.connection.send("go")
        else:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])


def settle(device: str) -> None:
    """The environment of this process and of those started from now on.

    On a CPU one thread per process, and no AMX, which some virtual machines announce and lack. Of
    several GPUs one is seen: on more the Trainer splits its batches.
    """
    if device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
        return
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    os.environ["CUDA_VISIBLE_DEVICES"] = seen.partition(",")[0]


def start(variant: Variant, size: str, device: str, steps: int, folder: Path) -> Player:
    """Launch a variant and wait until it runs."""
    listener = Listener(str(folder / f"{variant.name}.socket"), authkey=KEY)
    order = Order(variant, size, device, steps, str(listener.address), str(folder), time.time())
    path = folder / f"{variant.name}.json"
    path.write_text(json.dumps(asdict(order)), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.worker", str(path)]
    if variant.ranks > 1:
        launcher = ["torch.distributed.run", f"--nproc-per-node={variant.ranks}"]
        launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
        command = [sys.executable, "-m", *launcher, *command[1:]]
    log = folder / f"{variant.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    listener._listener._socket.settimeout(5)  # type: ignore[attr-defined]
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            connection = listener.accept()
            break
        except TimeoutError:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{variant.name} did not start:\n{tail}") from None
    return Player(variant, process, connection, log)
