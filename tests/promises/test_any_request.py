"""Whatever is asked: either sound settings or a RequestError, never anything else.

MINILORA_EXAMPLES says how many requests each test makes.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.settings.command_line import read_settings
from minilora.settings.foreign_keys import IGNORED, REFUSED
from minilora.settings.keys import all_settings
from minilora.settings.settings import Settings
from tests.support.any_value import found_or_refused, values

NEEDED = "model_name_or_path: base\ndataset: rows.json\noutput_dir: out\n"

any_request = settings(
    deadline=None,  # a busy machine is no failure
    max_examples=int(os.environ.get("MINILORA_EXAMPLES", "100")),
)
words = st.one_of(
    st.sampled_from([*(item.name for _, item in all_settings()), *REFUSED, *sorted(IGNORED)]),
    st.text(max_size=12),
)


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
