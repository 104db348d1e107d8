"""Which machine each process of a run is on, and by which name messages call it."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

# A torch.distributed.Store, which torch's own type hints leave out.
Store: TypeAlias = Any
# Where a launcher numbers its machines: torchrun, DeepSpeed's.
NODES = ("GROUP_RANK", "CROSS_RANK")


@dataclass(frozen=True)
class Process:
    """A process of the run, as the others can find it.

    place: the machine or container whose memory it shares, and where its number means something
    pid: its number there
    host: the name of its machine, which need not be the only one of that name
    node: the number that the launcher gave its machine, "" if it gave none
    address: of its machine, as it talks to MASTER_ADDR
    """

    place: str
    pid: int
    host: str
    node: str
    address: str


@dataclass(frozen=True)
class Machine:
    """What one launcher started: a machine, or a container. ranks: in their order."""

    name: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        word = "rank" if len(self.ranks) == 1 else "ranks"
        return f"{self.name} ({word} {', '.join(map(str, self.ranks))})"


def this_process(address: str) -> Process:
    """This process. address: of its machine, as it talks to MASTER_ADDR."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    # Containers of one machine share the boot, but each counts its processes on its own.
    numbering = os.readlink("/proc/self/ns/pid")
    node = next((os.environ[name] for name in NODES if name in os.environ), "")
    return Process(boot + numbering, os.getpid(), socket.gethostname(), node, address)


def machines_of(processes: Sequence[Process]) -> list[Machine]:
    """The machines of a run, in the order of their first ranks. processes: by rank.

    Two launchers on one computer are two machines. Where two have the same name, each name gets
    the machine's number behind it.
    """
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, process in enumerate(processes):
        ranks.setdefault((process.place, process.node), []).append(rank)

    hosts = [processes[own[0]].host for own in ranks.values()]
    count = Counter(hosts)
    return [
        Machine(host if count[host] == 1 else f"{host} (machine {number})", tuple(own))
        for number, (host, own) in enumerate(zip(hosts, ranks.values(), strict=True))
    ]
