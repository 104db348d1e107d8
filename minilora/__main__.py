"""The command `minilora`, which is also `python -m minilora`: one word for each command."""

from __future__ import annotations

import os
import sys

from minilora import __version__

# By the word that starts it: the module, and what it does.
COMMANDS = {
    "train": ("minilora.launch", "train an adapter, on every GPU of this machine"),
    "plan": ("minilora.plan", "say whether a run fits into the GPUs, before it starts"),
    "preview": ("minilora.preview", "show the data as the model gets it"),
    "generate": ("minilora.generate", "answer prompts"),
    "merge": ("minilora.merge", "write a model with its adapter merged in"),
    "plot": ("minilora.plot", "draw the curves of runs"),
    "tiny": ("minilora.tiny", "write a tiny checkpoint, to try things on a CPU"),
}


def main() -> int:
    """Run the command that the first word names; its exit code is that of the process.

    Returns 0 for the list of commands, 2 for a word that is no command.
    """
    word = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if word in ("--version", "-V"):
        print(f"minilora {__version__}")
        return 0
    if word in ("--help", "-h", "help"):
        print(usage())
        return 0
    if word not in COMMANDS:
        print(f"error: {word!r} is no command", usage(), sep="\n", file=sys.stderr)
        return 2

    # This process becomes `python -m MODULE`, so that both ways are one.
    module, _ = COMMANDS[word]
    os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[2:]])


def usage() -> str:
    """The list of commands."""
    lines = [f"  {word:<10}{meaning}" for word, (_, meaning) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: minilora COMMAND [ARGUMENTS]",
            *lines,
            "`minilora COMMAND --help` lists the arguments of a command.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
