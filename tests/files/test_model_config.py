"""config.json: both forms that there are mean the same, and another model's is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minilora.files.model_config import read_model_config, shape_from_config
from minilora.settings.errors import RequestError
from tests.support.models import LLAMA3_ROPE, random_llama


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "it is not known; Llama 3"),
        ({"num_key_value_heads": 3}, "must divide 4 attention heads"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor is None"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}},
            "mscale is 1.0: not known",
        ),
        ({"partial_rotary_factor": 0.5}, "only whole heads are rotated"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "only full_attention and"),
        ({"rope_scaling": {"type": "llama3"}}, "factor is None"),
        ({"hidden_act": "gelu"}, "only `silu` is known"),
        ({"head_dim": 7}, "even size"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000.*a positive number is needed"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True: a positive number is needed"),
    ],
)
def test_a_config_of_another_model_is_refused(changes: dict[str, object], message: str) -> None:
    config = {**random_llama().config.to_dict(), "rope_parameters": None, "rope_theta": 1e4}
    with pytest.raises(RequestError, match=message):
        shape_from_config({**config, **changes})


def test_all_that_is_wrong_is_said_at_once_with_the_files_name(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    wrong = {"model_type": "gpt2", "head_dim": 7, "rope_scaling": {"rope_type": "dynamic"}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **wrong}), encoding="utf-8")
    with pytest.raises(RequestError) as refused:
        read_model_config(tmp_path)
    starts = [f"{tmp_path}/config.json: {key} is " for key in ("model_type", "head_dim")]
    starts.append(f"{tmp_path}/config.json: rope_scaling: rope_type is ")
    assert len(refused.value.problems) == 3
    for problem, start in zip(refused.value.problems, starts, strict=True):
        assert problem.startswith(start)


def test_hub_form_and_transformers5_form_mean_the_same() -> None:
    new = random_llama().config.to_dict()
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    old |= {"rope_theta": 500000.0, "rope_scaling": scaling}
    assert shape_from_config(old) == shape_from_config(new)
    assert shape_from_config(new).rope.factor == 8.0


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("quantization_config", {"quant_method": "fp8"}, "weights are quantized (fp8)"),
        (
            "quantization_config",
            {"quant_method": "gptq", "bits": 4},
            "weights are quantized (gptq)",
        ),
        ("compression_config", {"format": "float-quantized"}, "weights are quantized, and only"),
        ("quantization", {"group_size": 64, "bits": 4}, "name the folder of the model that they"),
    ],
)
def test_a_quantized_checkpoint_gets_one_line(
    tiny: Path, tmp_path: Path, key: str, value: object, words: str
) -> None:
    """Not one for each of its tensors, whose names and dtypes are all others."""
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}), encoding="utf-8")
    with pytest.raises(RequestError) as refused:
        read_model_config(tmp_path)
    (problem,) = refused.value.problems
    assert f"config.json: {key}: " in problem and words in problem
    for nothing in (None, {}):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: nothing}))
        read_model_config(tmp_path)
