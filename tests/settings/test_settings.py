"""All settings together: contradictions between them are answered by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minilora.settings.keys import all_settings
from minilora.settings.settings import Settings
from tests.support.settings_files import NEEDED, check_argument, check_line_of_a_file, problems_of

# One line of YAML -> what the message must say besides the key and its line.
CONTRADICTIONS = {
    "lora_target: all,q_proj": "give all alone, or only names",
    "quantization_bit: 8": "8 is not supported: 4 is, or remove the key",
    "quantization_bit: 3": "3 is not supported: 4 is, or remove the key",
    "gather_tokens: 100": "100 is less than tile_tokens 2048; raise it or lower tile_tokens",
}


@pytest.mark.parametrize("line", CONTRADICTIONS)
def test_contradiction_of_one_line(tmp_path: Path, line: str) -> None:
    check_line_of_a_file(tmp_path, line, CONTRADICTIONS[line])
    check_argument(tmp_path, line, CONTRADICTIONS[line])


def test_contradictions(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, NEEDED + "mask_history: true\n", "--train_on_prompt")
    assert problem == (
        f"mask_history ({tmp_path / 'run.yaml'}:4) and train_on_prompt (command line) "
        "contradict each other: set one of them to false"
    )


def test_to_dict_has_every_key_once() -> None:
    assert list(Settings().to_dict()) == [item.name for _, item in all_settings()]
    assert json.loads(json.dumps(Settings().to_dict()))["lora_target"] == ["all"]
