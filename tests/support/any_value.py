"""Arbitrary values as a settings or JSON file may hold them, and what reading must make of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hypothesis import strategies as st

from minilora.settings.errors import RequestError

Found = TypeVar("Found")


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12))


values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)


def found_or_refused(read: Callable[[], Found]) -> Found | None:
    """What is read; None if it is refused, in words. Whatever else is raised is a failure."""
    try:
        return read()
    except RequestError as error:
        assert error.problems and all(error.problems)
        return None
