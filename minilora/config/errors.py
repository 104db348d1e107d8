"""What ends a run, and with which exit code."""

from collections.abc import Sequence


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
