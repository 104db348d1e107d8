"""Progress bars on stderr."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, unit: str, **options: Any) -> "tqdm[Any]":
    """tqdm's bar over `total` units; a file gets a line now and then instead of one for each."""
    pause = 0.1 if sys.stderr.isatty() else 10
    return tqdm(total=total, unit=unit, mininterval=pause, **options)
