"""What is written on the terminal: a stream that outlives its reader, and progress bars."""

import io
import sys
from contextlib import suppress
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, unit: str, **options: Any) -> "tqdm[Any]":
    """tqdm's bar over `total` units; a file gets a line now and then instead of one for each."""
    pause = 0.1 if sys.stderr.isatty() else 10
    return tqdm(total=total, unit=unit, mininterval=pause, **options)


class Lasting(io.TextIOWrapper):
    """A stream that goes on without its reader: Ctrl-C ends the `tee` behind a pipe first."""

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()
