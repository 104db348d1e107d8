"""What ends a command: its exit code, and its words on stderr."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import pytest

from minilora.settings.errors import RequestError, RunError, exit_code, shortened


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def work() -> NoReturn:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RequestError(["first", "second"]), 2, "error: first\nerror: second\n"),
        (RunError("out of memory"), 1, "error: out of memory\n"),
        (OSError(28, "No space left", "out"), 1, "error: [Errno 28] No space left: 'out'\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_has_its_exit_code_and_its_words(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(raising(error)) == code
    assert capsys.readouterr() == ("", words)


def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code(raising(ZeroDivisionError()))


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (1, 1)])
def test_without_an_error_the_work_decides(result: int | None, code: int) -> None:
    assert exit_code(lambda: result) == code


def test_many_problems_are_shortened_and_counted() -> None:
    many = [f"row {number}" for number in range(7)]
    assert shortened(many[:5]) == many[:5]
    assert shortened(many) == [*many[:5], "... and 2 more like the last one"]
    assert shortened(many, most=1) == ["row 0", "... and 6 more like the last one"]
