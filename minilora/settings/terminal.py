"""What is written to the terminal: progress bars, and a stream that outlives its reader."""

from __future__ import annotations

import io
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(total: int, unit: str, **options: Any) -> tqdm[Any]:
    """tqdm's bar over `total` units. In a file it leaves a line every ten seconds at most."""
    # Here, because importing tqdm takes longer than reading and checking all settings.
    from tqdm import tqdm

    seconds_between = 0.1 if sys.stderr.isatty() else 10
    return tqdm(total=total, unit=unit, mininterval=seconds_between, **options)


class Lasting(io.TextIOWrapper):
    """A stream that can be written to after its reader has ended.

    Ctrl-C also ends the `tee` behind a pipe, and the run still has a snapshot to write.
    """

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()
