"""The table of settings: its defaults, and its lines of --help."""

from __future__ import annotations

import dataclasses

import pytest

from minilora.settings.command_line import help_text
from minilora.settings.fields import kind_of
from minilora.settings.keys import MethodSettings, TrainSettings, all_settings
from minilora.settings.settings import Settings


def test_defaults_are_those_of_the_ecosystem() -> None:
    """HF TrainingArguments' and LLaMA-Factory's, but for the two that the help text calls ours."""
    transformers = pytest.importorskip("transformers")
    theirs = {
        item.name: item.default for item in dataclasses.fields(transformers.TrainingArguments)
    }
    # transformers 5 renamed or moved these; LLaMA-Factory's defaults are the older ones.
    ours = {"logging_steps", "output_dir", "bf16", "warmup_steps", "lr_scheduler_type"}
    shared = [item for item in dataclasses.fields(TrainSettings) if item.name in theirs]
    assert len(shared) > 15
    for item in shared:
        if item.name not in ours:
            value = theirs[item.name]
            default = ",".join(item.default) if isinstance(item.default, tuple) else item.default
            assert getattr(value, "value", value) == default, item.name
    assert MethodSettings(lora_rank=16).alpha == 32
    assert Settings().packs is False
    assert Settings(method=MethodSettings(stage="pt")).packs is True


def test_help_has_every_key_with_a_line() -> None:
    text = help_text("train").splitlines()
    for _, item in all_settings():
        (line,) = [line for line in text if line.startswith(f"  --{item.name} ")]
        assert item.metadata["help"] in line
        for choice in item.metadata["choices"]:
            assert choice in line
        assert kind_of(item)[0] in (bool, int, float, str, tuple, dict)
    assert any(line.startswith("  --learning_rate ") and line.endswith("[5e-05]") for line in text)
