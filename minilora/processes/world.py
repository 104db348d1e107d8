"""The processes of a run: joined first, tried out, in touch while it lasts, parted last."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from minilora.memory.measured import expand_segments
from minilora.processes.launcher import joining
from minilora.processes.ports import free_port
from minilora.processes.watch import Watch, this_process
from minilora.settings.errors import RequestError, RunError
from minilora.settings.settings import TrainSettings

# The time in which the ranks must manage to add up a megabyte. A sound link needs milliseconds.
LINK_SECONDS = 30

# Waiting on the host may take as long as one process needs to tokenise or to write.
HOST_PATIENCE = timedelta(days=7)


class World:
    """The processes of the run. Made first, closed last.

    rank, size: of this process among all of the run, and their number
    local_rank: of this process among those of its machine
    device: where this process computes
    host_group: a gloo group of all processes, for messages between hosts
    watch: ends this process if another one is lost

    Raises RequestError for bf16 on a GPU that has none, and for a port that is taken; RunError if
    the processes cannot join.
    """

    def __init__(self, train: TrainSettings) -> None:
        if "RANK" not in os.environ:
            _pretend_a_launcher_of_one()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))

        on_gpu = torch.cuda.is_available()
        if on_gpu:
            self.device = torch.device("cuda", self.local_rank)
            expand_segments()
            torch.cuda.set_device(self.device)
            if train.computes_in_bf16(on_gpu):
                _check_bf16_of_the_gpu()
        else:
            self.device = torch.device("cpu")

        patience = timedelta(seconds=train.ddp_timeout)
        with joining():
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=patience)
            self.host_group = dist.new_group(backend="gloo", timeout=HOST_PATIENCE)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.watch = Watch(self.rank, self.gather_objects(this_process()), train)

    def try_links(self) -> None:
        """Find out now, and not after ddp_timeout, whether the ranks can talk to each other.

        Collective; raises RunError.
        """
        remedy = "on GPUs without peer-to-peer (RTX 4090) set NCCL_P2P_DISABLE=1 and start again"
        too_late = f"the ranks could not add up 1 MB in {LINK_SECONDS} s: {remedy}"

        # A collective that hangs cannot be given up, so a timer ends the process.
        late = threading.Timer(LINK_SECONDS, self.watch.end, [too_late])
        late.start()
        try:
            ones = torch.ones(2**18, device=self.device)  # 1 MB in fp32
            dist.all_reduce(ones)
            wrong = int((ones != self.size).sum())
        finally:
            late.cancel()
        if wrong:
            raise RunError(f"the ranks added up 1 MB wrongly: {remedy}")

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """What is wrong with the request on one rank is raised on all. Collective at its end.

        A file that cannot be read is a wrong request too.
        """
        mine: Sequence[str] = ()
        try:
            yield
        except RequestError as error:
            mine = error.problems
        except OSError as error:
            mine = [f"{error.filename}: {error.strerror}"]

        # Each problem once, in the order of the ranks.
        problems = list(dict.fromkeys(chain.from_iterable(self.gather_objects(mine))))
        if problems:
            raise RequestError(problems)

    def gather_objects(self, mine: object) -> list[Any]:
        """What every rank passed in, by rank. Collective."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, mine, group=self.host_group)
        return gathered

    def gather_numbers(self, mine: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, by rank, in fp64. Collective; a handful of bytes."""
        row = torch.tensor(mine, dtype=torch.float64, device=self.device)
        rows = [torch.empty_like(row) for _ in range(self.size)]
        dist.all_gather(rows, row)
        return [numbers.tolist() for numbers in rows]

    def close(self) -> None:
        """Wait for all ranks, then part. Collective."""
        self.gather_objects(None)
        self.watch.over.set()
        dist.destroy_process_group()


def _pretend_a_launcher_of_one() -> None:
    """Set what a launcher sets: without one, this process is a world of its own."""
    os.environ["RANK"] = "0"
    os.environ["LOCAL_RANK"] = "0"
    os.environ["WORLD_SIZE"] = "1"
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(free_port())


def _check_bf16_of_the_gpu() -> None:
    """Raise RequestError if the GPU could only emulate bf16."""
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise RequestError([f"bf16: {name} has none, only Ampere and later; set bf16: false"])
