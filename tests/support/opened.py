"""Train as minilora.train does, and write down every file that Python opens.

-m tests.support.opened FOUND.json [ARGUMENTS OF minilora.train]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from minilora import train


def main() -> None:
    """An audit hook sees every open() of Python; the library that reads weights is no concern."""
    opened: list[str] = []
    sys.addaudithook(lambda name, args: opened.append(str(args[0])) if name == "open" else None)
    code = train.main(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps(opened), encoding="utf-8")
    train.leave(code)


if __name__ == "__main__":
    main()
