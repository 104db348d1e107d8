"""Which layers the settings name, as PEFT reads the same names and patterns."""

from __future__ import annotations

from pathlib import Path

import pytest

from minilora.files.model_config import read_model_config
from minilora.files.weights import read_checkpoint
from minilora.model.lora_shape import LoraShape
from minilora.settings.errors import RequestError
from minilora.settings.settings import MethodSettings
from tests.support.oracle import TARGETS, base_model, with_lora


@pytest.mark.parametrize(
    "target",
    [
        ("all",),
        ("up_proj", "q_proj"),
        ("mlp.up_proj", "layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"),
        (r"model\.layers\.1\.(self_attn|mlp)\.[qu].*",),
        (r".*_proj",),
    ],
    ids=str,
)
def test_settings_name_the_layers_as_peft_does(tiny: Path, target: tuple[str, ...]) -> None:
    shape = read_checkpoint(read_model_config(tiny)).shape
    patterns = {r"1\..*q_proj": 3, r".*_proj": 9}  # the first that matches counts
    lora = LoraShape.of(MethodSettings(lora_target=target, rank_pattern=patterns), shape)
    named = TARGETS if target == ("all",) else target if len(target) > 1 else target[0]
    peft = with_lora(base_model(tiny), lora.rank, lora.alpha, named, rank_pattern=patterns)
    theirs = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): len(tensor)
        for name, tensor in peft.named_parameters()
        if "lora_A" in name
    }
    assert {path: layer.rank for path, layer in lora.layers(shape).items()} == theirs
    assert set(theirs.values()) == {3, 9}


def test_a_name_or_pattern_begins_where_a_part_of_the_path_does(tiny: Path) -> None:
    """As in PEFT, for which `proj` is the end of no path, though q_proj ends with it."""
    shape = read_checkpoint(read_model_config(tiny)).shape
    with pytest.raises(RequestError, match="lora_target: no layer is called proj"):
        LoraShape.of(MethodSettings(lora_target=("proj",)), shape)
    with pytest.raises(RequestError, match="rank_pattern: 'proj' matches the end of no path"):
        LoraShape.of(MethodSettings(rank_pattern={"proj": 2}), shape)
    peft = with_lora(base_model(tiny), 4, 8, TARGETS, rank_pattern={"proj": 2})
    assert {len(p) for name, p in peft.named_parameters() if "lora_A" in name} == {4}


def test_a_tied_head_is_not_trained_alone(tiny_tied: Path) -> None:
    shape = read_checkpoint(read_model_config(tiny_tied)).shape
    with pytest.raises(RequestError, match="additional_target: this checkpoint ties lm_head"):
        LoraShape.of(MethodSettings(additional_target=("lm_head",)), shape)
