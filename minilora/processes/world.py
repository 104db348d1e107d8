"""The processes of a run: joined first, tried out, in touch while it lasts, parted last."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minilora.files.snapshot import last_snapshot
from minilora.memory.measured import expand_segments
from minilora.processes.launcher import joining
from minilora.processes.machines import machines_of
from minilora.processes.meeting import GLOO, choose_interface, interfaces, meet
from minilora.processes.ports import free_port
from minilora.processes.watch import Watch, reason_of
from minilora.settings.errors import JoinError, RequestError, RunError
from minilora.settings.settings import TrainSettings

# The time in which the ranks must manage to add up a megabyte. A sound link needs milliseconds.
LINK_SECONDS = 30

# The time in which processes that have met must connect. A sound network needs less than a second.
CONNECT_SECONDS = 60
NCCL = "NCCL_SOCKET_IFNAME"

# Waiting on the host may take as long as one process needs to tokenise or to write.
HOST_PATIENCE = timedelta(days=7)


class World:
    """The processes of the run. Made first, closed last. It touches no GPU until `open_device`.

    rank, size: of this process among all of the run, and their number
    machines: all machines; machine: that of this process
    device: where this process computes
    sharing: how many processes share the memory of this machine
    host_group: a gloo group of all processes, for messages between hosts
    watch: ends this process if another one is lost

    Raises RequestError for a port that is taken; RunError if the processes cannot join.
    """

    def __init__(self, train: TrainSettings) -> None:
        if "RANK" not in os.environ:
            _pretend_a_launcher_of_one()
        self.rank = int(os.environ["RANK"])
        self.size = int(os.environ["WORLD_SIZE"])
        on_gpu = torch.cuda.is_available()
        self.device = torch.device("cpu")
        if on_gpu:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

        with joining():
            store, processes = meet(self.rank, self.size, train.ddp_timeout)
            choose_interface(self.rank, processes)
        self.machines = machines_of(processes)
        self.machine = next(one for one in self.machines if self.rank in one.ranks)
        place = processes[self.rank].place
        self.sharing = sum(process.place == place for process in processes)
        self.watch = Watch(self.rank, processes, train, store)

        # Gloo would wait several times as long as the timeout that it is given.
        patience = timedelta(seconds=train.ddp_timeout)
        with self.watch.at_most(CONNECT_SECONDS, self._no_connection("")), joining():
            try:
                dist.init_process_group(
                    "nccl" if on_gpu else "gloo",
                    store=store, rank=self.rank, world_size=self.size, timeout=patience,
                )  # fmt: skip
                self.host_group = dist.new_group(backend="gloo", timeout=HOST_PATIENCE)
            except RuntimeError as error:
                if len(self.machines) == 1:
                    raise
                words = self._no_connection(f" ({reason_of(error)})")
                self.watch.leave_word(words)
                failure = JoinError(words)
                failure.told = self.rank > 0
                raise failure from None

    @property
    def leads(self) -> bool:
        """Whether this process does what one process of each machine does."""
        return self.rank == self.machine.ranks[0]

    def open_device(self, train: TrainSettings) -> None:
        """Take this process's GPU, if there are GPUs. Collective; raises RequestError."""
        with self.agreed():
            if self.device.type == "cuda":
                expand_segments()
                torch.cuda.set_device(self.device)
                if train.computes_in_bf16(on_gpu=True):
                    _check_bf16_of_the_gpu()

    def try_links(self) -> None:
        """Find out now, and not after ddp_timeout, whether the ranks can talk to each other.

        Collective; raises RunError.
        """
        remedy = "on GPUs without peer-to-peer (RTX 4090) set NCCL_P2P_DISABLE=1 and start again"
        if len(self.machines) > 1:
            remedy += f"; between machines, {NCCL} names the network interface that they share"
        too_late = f"the ranks could not add up 1 MB in {LINK_SECONDS} s: {remedy}"

        # A collective that hangs cannot be given up, so a timer ends the process.
        with self.watch.at_most(LINK_SECONDS, too_late):
            ones = torch.ones(2**18, device=self.device)  # 1 MB in fp32
            dist.all_reduce(ones)
            wrong = int((ones != self.size).sum())
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

        problems = self._told_by_machine(self.gather_objects(list(mine)))
        if problems:
            raise RequestError(problems)

    def _told_by_machine(self, by_rank: Sequence[Sequence[str]]) -> list[str]:
        """Each problem once, with the name of its machine where only some machines have it."""
        had_by: dict[str, list[str]] = {}
        for rank, problems in enumerate(by_rank):
            name = next(machine.name for machine in self.machines if rank in machine.ranks)
            for problem in problems:
                names = had_by.setdefault(problem, [])
                if name not in names:
                    names.append(name)
        everywhere = len(self.machines)
        return [
            problem if len(names) == everywhere else f"{', '.join(names)}: {problem}"
            for problem, names in had_by.items()
        ]

    def announce_snapshot(self, output: Path) -> None:
        """Let every rank know which snapshot the run can be resumed from. Collective.

        output: of rank 0, on whose machine the snapshots are; the others need not have it.
        """
        if len(self.machines) > 1:
            mine = ""
            if self.rank == 0:
                mine = last_snapshot(output, f" on {self.machine.name}")
            self.watch.saved = self.gather_objects(mine)[0]

    def from_rank0(self, tensor: Tensor | None) -> Tensor:
        """A tensor on the CPU that rank 0 passed in, for every rank. Collective.

        The other ranks pass in None.
        """
        like = (tensor.shape, tensor.dtype) if tensor is not None else None
        shape, dtype = self.gather_objects(like)[0]
        if tensor is None:
            tensor = torch.empty(shape, dtype=dtype)
        dist.broadcast(tensor, 0, group=self.host_group)
        return tensor

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

    def _no_connection(self, reason: str) -> str:
        """What is said where the processes have met, and gloo cannot connect them."""
        chosen = os.environ.get(GLOO)
        used = f"{GLOO}={chosen}" if chosen else f"the address of {socket.gethostname()}"
        there = ", ".join(f"{name} {' '.join(found[:1])}" for name, found in interfaces().items())
        return (
            f"{self.machine.name} cannot connect to the other processes by {used}{reason}; set "
            f"{GLOO} and {NCCL} to the network interface that all share; here are {there}"
        )

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
