"""Which signals end a run, noticed in this process."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from minilora.processes.signals import Stopped, StopRequest, stopping_at_once


@pytest.fixture(params=[signal.SIG_DFL, signal.SIG_IGN], ids=["terminal", "nohup"])
def inherited(request: pytest.FixtureRequest) -> Iterator[signal.Handlers]:
    """What this process does at SIGHUP when a run begins."""
    before = signal.signal(signal.SIGHUP, request.param)
    yield request.param
    assert signal.getsignal(signal.SIGHUP) == request.param, "put back at the end"
    signal.signal(signal.SIGHUP, before)


def test_a_lost_terminal_stops_a_run_unless_nohup_started_it(inherited: signal.Handlers) -> None:
    stopped = []
    try:
        with stopping_at_once():
            signal.raise_signal(signal.SIGHUP)
    except Stopped as error:
        stopped = [error.number]
    assert stopped == ([] if inherited == signal.SIG_IGN else [signal.SIGHUP])
    signal.signal(signal.SIGHUP, inherited)  # the first signal makes the process deaf to others


def test_in_the_steps_it_is_noted(inherited: signal.Handlers) -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.number == (0 if inherited == signal.SIG_IGN else signal.SIGHUP)
