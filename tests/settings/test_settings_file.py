"""Settings files: LLaMA-Factory's ways of writing them, and broken files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minilora.settings.command_line import read_settings
from minilora.settings.errors import RequestError
from tests.support.settings_files import NEEDED, problems_of, read

# Text of a file -> (its name, what the one message must say).
BROKEN_FILES = {
    "": ("run.yaml", "run.yaml: empty: no settings; write one `key: value` per line"),
    "# only a comment\n": ("run.yaml", "run.yaml: empty: no settings"),
    "just words": ("run.yaml", "run.yaml: not settings; write one `key: value` per line"),
    "- lora_rank\n": ("run.yaml", "run.yaml: not settings"),
    "a: 1\nb: [1,\n": ("run.yaml", "run.yaml:3: not YAML"),
    "a: 1\n\tb: 2\n": ("run.yaml", "run.yaml:2: not YAML"),
    "a: b: c\n": ("run.yaml", "run.yaml:1: not YAML"),
    "a: 1\n---\nb: 2\n": ("run.yaml", "not YAML"),
    "a: &x [*x]\n": ("run.yaml", "not YAML"),
    "a: \x07\n": ("run.yaml", "not YAML"),
    "a: " + "[" * 5000: ("run.yaml", "nested too deeply"),
    " ": ("run.json", "run.json:1: not JSON"),
    '{\n"a": 1\n"b"}': ("run.json", "run.json:3: not JSON"),
    "[1]": ("run.json", "run.json: not settings"),
    '{"a":' + "[" * 200000: ("run.json", "nested too deeply"),
}


@pytest.mark.parametrize("text", BROKEN_FILES, ids=lambda text: repr(text[:12]))
def test_broken_file(tmp_path: Path, text: str) -> None:
    name, message = BROKEN_FILES[text]
    (problem,) = problems_of(tmp_path, text, name=name)
    assert problem.startswith(str(tmp_path / name))
    assert message in problem


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"dataset: caf\xe9\n")
    cases = {
        "missing.yaml": ": no such file or directory",
        ".": ": not a plain file",
        "latin.yaml": ":1: not UTF-8; save the file as UTF-8",
        "a\0b.yaml": ": embedded null byte",
        "long" * 99: ": file name too long",
    }
    for name, message in cases.items():
        with pytest.raises(RequestError) as caught:
            read_settings([f"{tmp_path}/{name}", "--lora_rank", "0"], "train")
        first, second = caught.value.problems
        assert first == f"settings file: {Path(tmp_path, name)}{message}"
        assert second == "lora_rank (command line): 0 must be at least 1"


def test_twice_in_json(tmp_path: Path) -> None:
    text = '{"seed": 1, "model_name_or_path": "m", "dataset": "d", "output_dir": "o", "seed": 2}'
    (problem,) = problems_of(tmp_path, text, name="run.json")
    assert problem == f"seed ({tmp_path / 'run.json'}) stands there more than once"


def test_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    text = '{"model_name_or_path": "base", "dataset": "d", "output_dir": "o"}'
    assert read(tmp_path, "\ufeff" + NEEDED).model.model_name_or_path == "base"
    assert read(tmp_path, "\ufeff" + text, name="run.json").model.model_name_or_path == "base"


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate: 5e-5", "learning_rate", 5e-5),
        ("learning_rate: 1.0E-4", "learning_rate", 1e-4),
        ("learning_rate: '5e-5'", "learning_rate", 5e-5),
        ("num_train_epochs: 3", "num_train_epochs", 3.0),
        ("max_samples: 1e5", "max_samples", 100000),
        ("save_steps: 500.0", "save_steps", 500),
        ("max_samples: 100_000", "max_samples", 100000),
        ("save_strategy: no", "save_strategy", "no"),
        ("bf16: yes", "bf16", True),
        ("bf16: False", "bf16", False),
        ("packing: on", "packing", True),
        ("lora_alpha:", "lora_alpha", None),
        ("lora_alpha: null", "lora_alpha", None),
        ("template: ~", "template", None),
        ("default_system: 'null'", "default_system", "null"),
        ("seed: null", "seed", 42),
        ("default_system: yes", "default_system", "yes"),
        ("default_system: |\n  two\n  lines", "default_system", "two\nlines"),
        ("lora_target: q_proj,v_proj", "lora_target", ("q_proj", "v_proj")),
        ("lora_target: q_proj, v_proj,", "lora_target", ("q_proj", "v_proj")),
        ("lora_target: [q_proj, v_proj]", "lora_target", ("q_proj", "v_proj")),
        ("lora_target:\n- q_proj\n- v_proj", "lora_target", ("q_proj", "v_proj")),
        ("neat_packing: true", "packing", True),
        ("neat_packing: false", "packing", None),
    ],
)
def test_yaml_means_what_llama_factory_takes_it_for(
    tmp_path: Path, text: str, key: str, value: object
) -> None:
    found = read(tmp_path, NEEDED + text).to_dict()[key]
    assert (type(found), found) == (type(value), value)


def test_json_file(tmp_path: Path) -> None:
    text = json.dumps(
        {
            "model_name_or_path": "base",
            "dataset": ["a.json", "b"],
            "output_dir": "o",
            "bf16": True,
            "packing": False,
            "lora_alpha": None,
            "learning_rate": 1e-4,
            "max_samples": 10,
        },
        indent="\t",
    )
    found = read(tmp_path, text, name="run.json").to_dict()
    assert found["dataset"] == ("a.json", "b")
    assert (found["bf16"], found["packing"], found["lora_alpha"]) == (True, False, None)
    assert (found["learning_rate"], found["max_samples"]) == (1e-4, 10)
