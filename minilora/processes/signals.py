"""Stopping in good order: the first SIGTERM, SIGINT or SIGHUP ends the run after its step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import NoReturn

# SIGHUP is what a process gets when its terminal is gone, as when an ssh connection breaks.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# The terminal sends Ctrl-C to every process, and launchers pass it on once more.
ECHO_SECONDS = 1


class Stopped(BaseException):
    """The run was asked to stop, and did so with everything written.

    It is no Exception, because libraries catch those. number: of the signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def heeded() -> list[signal.Signals]:
    """The signals that stop a run: all, but SIGHUP only if it was not ignored before (nohup)."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in SIGNALS if number != signal.SIGHUP or not ignored]


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Outside the steps a signal raises Stopped, wherever the process is."""

    numbers = heeded()

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        # A second signal must not interrupt the clean-up after the first one.
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number, f"{signal.Signals(number).name}: stopped outside the steps")

    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class StopRequest:
    """Notes the first signal; a second one of the same kind ends the process at once.

    If the launcher has ended, that counts as SIGTERM: it was asked to stop, or it was killed and
    can never stop this process.
    """

    def __init__(self) -> None:
        self._number = 0
        self._launchers = _launchers()

    def __enter__(self) -> StopRequest:
        self._numbers = heeded()
        self._before = [signal.signal(number, self._note) for number in self._numbers]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        for number, handler in zip(self._numbers, self._before, strict=True):
            signal.signal(number, handler)

    @property
    def number(self) -> int:
        """The first signal that came, or 0."""
        if not self._number and _launchers() != self._launchers:
            return signal.SIGTERM
        return self._number

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = self._number or number

        # The launcher's echo of the same Ctrl-C is not a second request.
        signal.signal(number, signal.SIG_IGN)
        time.sleep(ECHO_SECONDS)
        signal.signal(number, signal.SIG_DFL)


def _launchers() -> list[int]:
    """The processes above this one that started it and wait for it; none without a launcher."""
    # Here, because --help is answered without it, and this file is imported before.
    import psutil

    if "CROSS_RANK" in os.environ:
        levels = 2  # DeepSpeed's launcher is two processes, one above the other
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        levels = 1
    else:
        levels = 0
    above = psutil.Process().parents() if levels else []
    return [process.pid for process in above[:levels]]
