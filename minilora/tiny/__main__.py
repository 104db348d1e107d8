"""Write the tiny checkpoint: `python -m minilora.tiny DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from minilora.settings.errors import RequestError
from minilora.tiny.checkpoint import write_tiny


def main(argv: Sequence[str] | None = None) -> int:
    """Write the demo's checkpoint. Returns 0 done, 1 it cannot be written, 2 it may not be."""
    parser = argparse.ArgumentParser(prog="python -m minilora.tiny", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write it")
    folder = parser.parse_args(argv).folder
    try:
        write_tiny(folder)
    except RequestError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error}; name a folder that can be written", file=sys.stderr)
        return 1
    print(f"tiny checkpoint: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
