"""Where processes meet: who is not there is said, and gloo gets the interface that leads there."""

from __future__ import annotations

import os
import socket

import pytest

from minilora.processes.machines import Process
from minilora.processes.meeting import GLOO, choose_interface, interfaces, meet
from minilora.settings.errors import JoinError


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv(GLOO, "")  # so that it is put back after the test
    del os.environ[GLOO]


def process(place: str, address: str) -> Process:
    return Process(place, 1, "host", "", address)


def test_a_rank_that_finds_nobody_says_where_it_looked() -> None:
    port = os.environ["MASTER_PORT"]
    with pytest.raises(JoinError, match=rf"nobody can be reached at 127.0.0.1:{port} \(Connection"):
        meet(rank=1, size=2, patience=0)


def test_rank_0_says_how_many_came() -> None:
    with pytest.raises(JoinError, match=r"1 of 3 processes came to .*; ranks 1, 2 did not: start"):
        meet(rank=0, size=3, patience=0.2)


def test_gloo_gets_the_interface_that_reaches_the_other_machine() -> None:
    """Rank 0 knows itself as 127.0.0.1 where its own name resolves to that, as on Debian."""
    outward = [
        (name, address)
        for name, addresses in interfaces().items()
        for address in addresses
        if "." in address and not address.startswith("127.")
    ]
    if not outward:
        pytest.skip("this machine has no network")
    name, address = outward[0]

    choose_interface(0, [process("a", "127.0.1.1"), process("b", address)])
    assert os.environ.pop(GLOO) == name
    choose_interface(1, [process("a", "127.0.1.1"), process("b", address)])
    assert os.environ.pop(GLOO) == name

    choose_interface(0, [process("a", address), process("a", address)])
    assert GLOO not in os.environ, "all are on one machine"
    choose_interface(0, [process("a", "127.0.0.1"), process("b", "127.0.0.1")])
    assert GLOO not in os.environ, "two containers that share a network"
    os.environ[GLOO] = "mine"
    choose_interface(0, [process("a", address), process("b", address)])
    assert os.environ[GLOO] == "mine"
