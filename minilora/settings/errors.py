"""What ends a run, and with which exit code."""

import sys
from collections.abc import Callable, Sequence


class RequestError(Exception):
    """The request is wrong (settings, data or weights): exit code 2, with every problem found."""

    def __init__(self, problems: Sequence[str]) -> None:
        assert not isinstance(problems, str), "a list of problems, not one string"
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def shortened(problems: Sequence[str], most: int = 5) -> list[str]:
    """The first of many problems of one kind, and how many more there are."""
    more = len(problems) - most
    return [*problems[:most], *([f"... and {more} more like the last one"] if more > 0 else [])]


class RunError(Exception):
    """Something happened in the run: exit code 1, with what happened and the next step."""

    told = False  # whether it has been printed already


def exit_code(work: Callable[[], int | None]) -> int:
    """Do the work of a command, and say on stderr what ends it.

    Returns what the work returns, or 0; 1 something happened, 2 the request is wrong, 130 Ctrl-C.
    """
    try:
        return work() or 0
    except RequestError as error:
        code, problems = 2, error.problems
    except (RunError, OSError) as error:
        code, problems = 1, (str(error),)
    except KeyboardInterrupt:
        return 130
    print(*(f"error: {problem}" for problem in problems), sep="\n", file=sys.stderr)
    return code
