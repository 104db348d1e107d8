"""adapter_config.json: read as the shape that was written; what is not LoRA is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minilora.files.adapter_config import CONFIG, peft_config, read_adapter_shape
from minilora.files.model_config import read_model_config
from minilora.model.lora_shape import LoraShape
from minilora.settings.errors import RequestError

PLAIN = LoraShape(3, 12, 0.0, ("q_proj", "o_proj", "up_proj"))


def write(folder: Path, lora: LoraShape, **changes: Any) -> None:
    """An adapter_config.json with some keys changed."""
    config = {**peft_config(lora, Path("base")), **changes}
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
    ("key", "value", "message"),
    [
        ("peft_type", "IA3", "peft_type is 'IA3', not LORA"),
        ("r", 0, "r is 0"),
        ("r", "16", "r is '16'"),
        ("lora_alpha", None, "lora_alpha is None"),
        pytest.param(
            "lora_alpha", 10**400, "; a positive number is needed", id="more than a float holds"
        ),
        ("lora_bias", True, "lora_bias = True is not read here"),
        ("bias", "all", "bias = 'all'"),
        ("modules_to_save", ["norm"], "norm cannot be trained whole; embed_tokens, lm_head can"),
        ("modules_to_save", "lm_head", "modules_to_save is 'lm_head'; a list is needed"),
        ("rank_pattern", {"q_proj": 2.5}, "rank_pattern is {'q_proj': 2.5}; positive numbers"),
        ("alpha_pattern", ["q_proj"], "alpha_pattern is ['q_proj']; positive numbers"),
        ("alpha_pattern", {"(?i)q": 2}, "alpha_pattern: '(?i)q' is no regular expression"),
        ("layers_to_transform", [2], "layers_to_transform = [2] names no layer"),
        ("layers_to_transform", ["0"], "layers_to_transform is ['0']; a list is needed"),
        ("init_lora_weights", "pissa", "init_lora_weights = 'pissa' changes the base weights"),
        ("target_modules", "all-linear", "'all-linear' matches the whole path of no layer"),
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
