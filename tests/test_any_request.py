"""Whatever is asked: either sound settings or a RequestError, never anything else.

MINILORA_EXAMPLES says how many requests each test makes.
"""

import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.arguments import read_settings
from minilora.config import RequestError, Settings, all_settings
from minilora.config.known_keys import REFUSED

Found = TypeVar("Found")
NEEDED = "model_name_or_path: base\ndataset: rows.json\noutput_dir: out\n"

any_request = settings(
    deadline=None,  # a busy machine is no failure
    max_examples=int(os.environ.get("MINILORA_EXAMPLES", "100")),
)
words = st.one_of(
    st.sampled_from([item.name for _, item in all_settings()] + list(REFUSED)),
    st.text(max_size=12),
)
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


def asked(argv: list[str]) -> Settings | None:
    """The settings; None if they are refused, or if help is asked for."""
    if {"--help", "-h"} & set(argv):
        return None
    return found_or_refused(lambda: read_settings(argv, "train"))


def is_sound(found: Settings) -> bool:
    """Whether there is what every run needs."""
    needed = (found.model.model_name_or_path, found.train.output_dir, found.data.dataset)
    return all(needed)


@any_request
@given(st.dictionaries(words, values, max_size=6))
def test_any_json(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    needed = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}
    path.write_text(json.dumps(needed | content))
    found = asked([str(path)])
    assert found is None or is_sound(found)


@any_request
@given(
    st.lists(st.one_of(st.tuples(words, st.text(max_size=12)), st.text(max_size=30)), max_size=5)
)
def test_any_yaml(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str | tuple[str, str]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    text = [line if isinstance(line, str) else f"{line[0]}: {line[1]}" for line in lines]
    path.write_text(NEEDED + "\n".join(text), encoding="utf-8", errors="replace")
    found = asked([str(path)])
    assert found is None or is_sound(found)


@any_request
@given(st.binary(max_size=60))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(content)
    found = asked([str(path)])
    assert found is None or is_sound(found)


@any_request
@given(st.lists(st.one_of(words.map("--{}".format), words, st.text(max_size=12)), max_size=6))
def test_any_command_line(argv: list[str]) -> None:
    found = asked(argv)
    assert found is None or is_sound(found)
