"""adapter_config.json: read as the shape that was written; what is not LoRA is refused."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from minilora.files.adapter_config import CONFIG, peft_config, read_adapter_shape
from minilora.files.model_config import read_model_config
from minilora.model.lora_shape import LoraShape
from minilora.settings.errors import RequestError
from minilora.settings.text_files import read_json

PLAIN = LoraShape(3, 12, 0.0, ("q_proj", "o_proj", "up_proj"))


# What the expression of the case "patterns" matches, in blocks that may be any.
LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]


def write(folder: Path, lora: LoraShape, **changes: Any) -> None:
    """An adapter_config.json with some keys changed."""
    config = {**peft_config(lora, Path("base"), LAYERS), **changes}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    "lora",
    [
        PLAIN,
        LoraShape(4, 8, 0.1, ("q_proj",), use_dora=True, modules_to_save=("lm_head",)),
        LoraShape(
            rank=4,
            alpha=8.5,
            dropout=0.0,
            targets=r"model\.layers\.(0\..*|1\.mlp\.\w+)_proj",
            use_rslora=True,
            rank_pattern={"up_proj": 6, "q_proj": 2},
            alpha_pattern={"k_proj": 0.5},
        ),
    ],
    ids=["plain", "dora", "patterns"],
)
def test_what_is_written_is_read_as_the_same_shape(
    tiny: Path, tmp_path: Path, lora: LoraShape
) -> None:
    write(tmp_path, lora)
    read = read_adapter_shape(tmp_path, read_model_config(tiny).shape, lora.dropout)
    if isinstance(lora.targets, str):  # written as the list of what it matches
        lora = replace(lora, targets=tuple(LAYERS))
    assert read == lora
    assert list(read.rank_pattern) == list(lora.rank_pattern), "the first that matches counts"


def test_a_choice_of_blocks_becomes_the_paths_of_their_layers(tiny: Path, tmp_path: Path) -> None:
    write(tmp_path, PLAIN, layers_to_transform=[1])
    lora = read_adapter_shape(tmp_path, read_model_config(tiny).shape, 0.0)
    assert lora.targets == (
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.up_proj",
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_to_transform": 1},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"exclude_modules": ["up_proj", "model.layers.0.self_attn.q_proj"]},
        {"exclude_modules": r".*\.1\..*|.*o_proj"},
        {"bias": "lora_only", "fan_in_fan_out": True},
        {"bias": "all", "exclude_modules": []},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_what_peft_makes_of_the_config_is_what_is_read(
    tiny: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The layers that get a pair in PEFT, and no parameter that is anything else."""
    write(tmp_path, PLAIN, inference_mode=False, **changes)
    lora = read_adapter_shape(tmp_path, read_model_config(tiny).shape, 0.0)
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fan_in_fan_out, which PEFT corrects
            theirs = get_peft_model(base, LoraConfig(**read_json(tmp_path / CONFIG)))
    trained = {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    expected = {
        f"base_model.model.{layer}.lora_{half}.default.weight"
        for layer in lora.layers(read_model_config(tiny).shape)
        for half in "AB"
    }
    assert trained == expected


def test_biases_that_a_model_has_are_not_read(tiny: Path, tmp_path: Path) -> None:
    write(tmp_path, PLAIN, bias="lora_only")
    shape = replace(read_model_config(tiny).shape, biased=("q_proj",))
    with pytest.raises(RequestError, match="bias = 'lora_only': trained biases are not read"):
        read_adapter_shape(tmp_path, shape, 0.0)


def test_the_base_is_named_by_an_absolute_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative one is right from one folder only. A link is not resolved: it may be moved."""
    monkeypatch.chdir("/")
    assert peft_config(PLAIN, Path("models/base"), [])["base_model_name_or_path"] == "/models/base"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bias", "some", "bias = 'some'"),
        ("exclude_modules", r".*_proj", "exclude_modules = '.*_proj' leaves no layer"),
        ("exclude_modules", "(", "exclude_modules is '(': no expression"),
        ("exclude_modules", 3, "exclude_modules is 3; a list is needed"),
        ("layers_pattern", "h", "layers_pattern = 'h': Llama's blocks are called `layers`"),
        ("peft_type", "IA3", "peft_type is 'IA3', not LORA"),
        ("r", 0, "r is 0"),
        ("r", "16", "r is '16'"),
        ("lora_alpha", None, "lora_alpha is None"),
        pytest.param(
            "lora_alpha", 10**400, "; a positive number is needed", id="more than a float holds"
        ),
        ("lora_bias", True, "lora_bias = True is not read here"),
        ("modules_to_save", ["norm"], "norm cannot be trained whole; embed_tokens, lm_head can"),
        ("modules_to_save", "lm_head", "modules_to_save is 'lm_head'; a list is needed"),
        ("rank_pattern", {"q_proj": 2.5}, "rank_pattern is {'q_proj': 2.5}; positive numbers"),
        ("alpha_pattern", ["q_proj"], "alpha_pattern is ['q_proj']; positive numbers"),
        ("alpha_pattern", {"(?i)q": 2}, "alpha_pattern: '(?i)q' is no regular expression"),
        ("layers_to_transform", [2], "layers_to_transform = [2] leaves no layer"),
        ("layers_to_transform", ["0"], "layers_to_transform is ['0']; a list is needed"),
        ("init_lora_weights", "pissa", "init_lora_weights = 'pissa' changes the base weights"),
        ("target_modules", "all", "'all' matches the whole path of no layer"),
        ("target_modules", ["wq"], "no layer is called wq"),
    ],
)
def test_an_adapter_that_cannot_be_continued_is_refused(
    tiny: Path, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    write(tmp_path, PLAIN, **{key: value})
    with pytest.raises(RequestError) as refused:
        read_adapter_shape(tmp_path, read_model_config(tiny).shape, 0.0)
    assert message in str(refused.value)
