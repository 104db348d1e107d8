"""Whatever is asked: either sound settings or a RequestError, never anything else.

MINILORA_EXAMPLES says how many requests each test makes.
"""

import json
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.arguments import read_settings
from minilora.config import RequestError, all_settings
from minilora.config.known_keys import REFUSED

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


def accepted_or_refused(argv: list[str]) -> None:
    """Wrong requests raise RequestError and nothing else; right ones give sound settings."""
    if {"--help", "-h"} & set(argv):
        return
    try:
        found = read_settings(argv, "train")
    except RequestError as error:
        assert error.problems and all(error.problems)
    else:
        assert found.model.model_name_or_path and found.train.output_dir
        assert found.data.dataset


@any_request
@given(st.dictionaries(words, values, max_size=6))
def test_any_json(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    needed = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}
    path.write_text(json.dumps(needed | content))
    accepted_or_refused([str(path)])


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
    accepted_or_refused([str(path)])


@any_request
@given(st.binary(max_size=60))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(content)
    accepted_or_refused([str(path)])


@any_request
@given(st.lists(st.one_of(words.map("--{}".format), words, st.text(max_size=12)), max_size=6))
def test_any_command_line(argv: list[str]) -> None:
    accepted_or_refused(argv)
