"""What ends a run early, and with which exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


class RequestError(Exception):
    """The request is wrong (settings, data or weights): exit code 2, with every problem found."""

    def __init__(self, problems: Sequence[str]) -> None:
        assert not isinstance(problems, str), "a list of problems, not one string"
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class RunError(Exception):
    """Something happened in the run: exit code 1, with what happened and the next step.

    told: whether the message has been printed already.
    """

    told = False


class JoinError(RunError):
    """The processes could not join, so that each machine has to say it itself."""


def shortened(problems: Sequence[str], most: int = 5) -> list[str]:
    """The first of many problems of one kind, and a line that says how many more there are."""
    shown = list(problems[:most])
    if len(problems) > most:
        shown.append(f"... and {len(problems) - most} more like the last one")
    return shown


def exit_code(work: Callable[[], int | None]) -> int:
    """Do the work of a command, and print on stderr what went wrong.

    Returns what the work returns, or 0 for None; 1 if something happened, 2 if the request is
    wrong, 130 after Ctrl-C.
    """
    try:
        return work() or 0
    except RequestError as error:
        _print_problems(error.problems)
        return 2
    except (RunError, OSError) as error:
        _print_problems([str(error)])
        return 1
    except KeyboardInterrupt:
        return 130


def _print_problems(problems: Sequence[str]) -> None:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
