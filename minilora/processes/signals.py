"""Stopping in good order: the first SIGTERM or SIGINT ends the run after its step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Launchers pass on a Ctrl-C that the terminal has sent to every process already.
ECHO_SECONDS = 1


class Stopped(BaseException):
    """The run was asked to stop, and did so with everything written.

    No Exception: libraries catch those.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Outside the steps a signal raises Stopped, wherever the process is."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number, f"{signal.Signals(number).name}: stopped outside the steps")

    before = [signal.signal(number, stop) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


class StopRequest:
    """Notes the first signal; a second one of the same kind ends the process at once.

    That the launcher has ended counts as SIGTERM: nobody waits for this process any more.
    """

    def __init__(self) -> None:
        self._number = 0
        self._launchers = _launchers()

    def __enter__(self) -> StopRequest:
        self._before = [signal.signal(number, self._note) for number in SIGNALS]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        where: TracebackType | None,
    ) -> None:  # fmt: skip
        for number, handler in zip(SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    @property
    def number(self) -> int:
        """The first signal that came, or 0."""
        if not self._number and _launchers() != self._launchers:
            return signal.SIGTERM
        return self._number

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = self._number or number
        signal.signal(number, signal.SIG_IGN)
        time.sleep(ECHO_SECONDS)
        signal.signal(number, signal.SIG_DFL)


def _launchers() -> list[int]:
    """The processes above this one that started it to wait for it; none without a launcher."""
    parent = os.getppid()
    if "CROSS_RANK" in os.environ:  # DeepSpeed's launcher is two processes, one above the other
        stat = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8", errors="replace")
        return [parent, int(stat.rpartition(") ")[2].split()[1])]
    return [parent] if "TORCHELASTIC_RUN_ID" in os.environ else []
