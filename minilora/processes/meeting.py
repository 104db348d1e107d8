"""How the processes find each other: at the launcher's store, where each one says who it is."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from ipaddress import ip_address

import psutil
import torch.distributed as dist

from minilora.processes.machines import Process, Store, this_process
from minilora.settings.errors import JoinError

# The longest that processes wait for each other to start, whatever ddp_timeout says:
# LLaMA-Factory's files say 180000000 seconds.
MEETING_SECONDS = 1800
# After this time rank 0 says for whom it waits.
NOTICE_SECONDS = 30
# The longest that the store may take to answer.
STORE_SECONDS = 60
CAME = "came"
GLOO = "GLOO_SOCKET_IFNAME"


def meet(rank: int, size: int, patience: float) -> tuple[Store, list[Process]]:
    """The launcher's store, and all processes by rank, once all have come to it.

    patience: seconds to wait for the others, of which MEETING_SECONDS count. Raises JoinError if
    some do not come, with how many did; and what torch raises for a store that cannot be made.
    """
    deadline = time.monotonic() + min(patience, MEETING_SECONDS)
    store = _store(rank, deadline)
    mine = this_process(_own_address())
    store.set(f"process {rank}", json.dumps(asdict(mine)))
    store.add(CAME, 1)

    notice = time.monotonic() + NOTICE_SECONDS
    while (came := store.add(CAME, 0)) < size:
        now = time.monotonic()
        if rank == 0 and now > notice:
            notice = deadline
            waiting = f"waiting at {_where()} for the other processes: {came} of {size} have come"
            print(waiting, file=sys.stderr, flush=True)
        if now > deadline:
            raise JoinError(_who_is_missing(store, size))
        time.sleep(0.05)

    texts = store.multi_get([f"process {other}" for other in range(size)])
    return store, [Process(**json.loads(text)) for text in texts]


def choose_interface(rank: int, processes: Sequence[Process]) -> None:
    """Let gloo use the network interface that reaches the other machines.

    Gloo takes the address that the own host name resolves to. In Debian's /etc/hosts that is
    127.0.1.1, where no other machine can connect to. Nothing is done where GLOO_SOCKET_IFNAME is
    set, or if all processes are on one machine.
    """
    mine = processes[rank]
    others = [other.address for other in processes if other.place != mine.place]
    if GLOO in os.environ or not others:
        return
    address = mine.address
    if _is_loopback(address):
        # MASTER_ADDR is this machine; what reaches another machine shows which interface is meant.
        address = next((_source(other) for other in others if not _is_loopback(other)), "")
    for name, addresses in interfaces().items():
        if address in addresses and not _is_loopback(address):
            os.environ[GLOO] = name


def interfaces() -> dict[str, list[str]]:
    """The addresses of this machine by network interface."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [entry.address.partition("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }


def _store(rank: int, deadline: float) -> Store:
    """A client of the store at MASTER_ADDR, which torchrun keeps, or else rank 0."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    kept_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeps = rank == 0 and not kept_by_torchrun
    if not keeps:
        _wait_for_store(address, port, deadline)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address,
        port,
        is_master=keeps,
        timeout=timedelta(seconds=STORE_SECONDS),
        wait_for_workers=False,
        multi_tenant=keeps,
    )
    # What an earlier attempt left in torchrun's store does not count.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"minilora {attempt}", store)  # type: ignore[attr-defined]


def _wait_for_store(address: str, port: int, deadline: float) -> None:
    """Wait until somebody listens there. Unlike torch's own wait, a signal ends this one."""
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline or isinstance(error, socket.gaierror):
                raise JoinError(
                    f"nobody can be reached at {_where()} ({error.strerror or error}): do "
                    "MASTER_ADDR and MASTER_PORT name rank 0's machine, and does a firewall let "
                    "this machine through?"
                ) from None
        time.sleep(0.2)


def _who_is_missing(store: Store, size: int) -> str:
    missing = [rank for rank in range(size) if not store.check([f"process {rank}"])]
    hosts = {
        json.loads(store.get(f"process {rank}"))["host"]
        for rank in range(size)
        if rank not in missing
    }
    return (
        f"{size - len(missing)} of {size} processes came to {_where()}, from "
        f"{', '.join(sorted(hosts))}; ranks {', '.join(map(str, missing))} did not: start the "
        "launcher on every machine, with the same address and port"
    )


def _where() -> str:
    """The address and port at which the processes meet."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _own_address() -> str:
    """The address from which this machine reaches MASTER_ADDR; "" if there is no way there."""
    return _source(os.environ["MASTER_ADDR"])


def _source(target: str) -> str:
    with suppress(OSError):
        family, kind, *_, place = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # of a datagram socket: nothing is sent
            return str(probe.getsockname()[0]).partition("%")[0]
    return ""


def _is_loopback(address: str) -> bool:
    return not address or ip_address(address).is_loopback
