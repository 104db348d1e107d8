"""The published config.json of every size, windows of attention, and what is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from minilora.files.deepspeed_file import Facts, read_deepspeed_files
from minilora.files.model_config import shape_from_config
from minilora.files.model_families import FAMILIES, window_problem
from minilora.memory.ways import asked_way
from minilora.plan import main as plan
from minilora.settings.command_line import read_settings
from tests.support.models import random_model

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLE = ROOT / "examples" / "qwen3_8b_7x4090.yaml"
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
QWEN = {"rope_theta": 1000000.0, "rms_norm_eps": 1e-06, "hidden_act": "silu"}
WINDOW_OFF = {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28}
QWEN25 = {"model_type": "qwen2", "max_position_embeddings": 32768, **QWEN, **WINDOW_OFF}
QWEN3 = {
    "model_type": "qwen3",
    "max_position_embeddings": 40960,
    "head_dim": 128,
    "attention_bias": False,
    "rope_scaling": None,
    **QWEN,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 28,
}
MISTRAL = {**QWEN, "model_type": "mistral", "rms_norm_eps": 1e-05, "sliding_window": None}
# The published files in numbers: what is common, SIZES, whether tied, the parameters.
PUBLISHED: dict[str, tuple[dict[str, Any], tuple[int, ...], bool, int]] = {
    "Qwen2.5-0.5B": (QWEN25, (896, 4864, 24, 14, 2, 151936), True, 494_032_768),
    "Qwen2.5-1.5B": (QWEN25, (1536, 8960, 28, 12, 2, 151936), True, 1_543_714_304),
    "Qwen2.5-3B": (QWEN25, (2048, 11008, 36, 16, 2, 151936), True, 3_085_938_688),
    "Qwen2.5-7B": (QWEN25, (3584, 18944, 28, 28, 4, 152064), False, 7_615_616_512),
    "Qwen2.5-14B": (QWEN25, (5120, 13824, 48, 40, 8, 152064), False, 14_770_033_664),
    "Qwen2.5-32B": (QWEN25, (5120, 27648, 64, 40, 8, 152064), False, 32_763_876_352),
    "Qwen2.5-72B": (QWEN25, (8192, 29568, 80, 64, 8, 152064), False, 72_706_203_648),
    "Qwen3-0.6B": (QWEN3, (1024, 3072, 28, 16, 8, 151936), True, 596_049_920),
    "Qwen3-1.7B": (QWEN3, (2048, 6144, 28, 16, 8, 151936), True, 1_720_574_976),
    "Qwen3-4B": (QWEN3, (2560, 9728, 36, 32, 8, 151936), True, 4_022_468_096),
    "Qwen3-8B": (QWEN3, (4096, 12288, 36, 32, 8, 151936), False, 8_190_735_360),
    "Qwen3-14B": (QWEN3, (5120, 17408, 40, 40, 8, 151936), False, 14_768_307_200),
    "Qwen3-32B": (QWEN3, (5120, 25600, 64, 64, 8, 151936), False, 32_762_123_264),
    "Mistral-7B-v0.3": (
        {**MISTRAL, "max_position_embeddings": 32768},
        (4096, 14336, 32, 32, 8, 32768),
        False,
        7_248_023_552,
    ),
    "Mistral-Nemo-2407": (
        {**MISTRAL, "max_position_embeddings": 1024000, "head_dim": 128},
        (5120, 14336, 40, 32, 8, 131072),
        False,
        12_247_782_400,
    ),
}


def published(name: str) -> dict[str, Any]:
    common, sizes, tied, _ = PUBLISHED[name]
    return {**common, **dict(zip(SIZES, sizes, strict=True)), "tie_word_embeddings": tied}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_parameters_and_are_planned(name: str) -> None:
    shape = shape_from_config(published(name))
    elements = sum(math.prod(size) for size in shape.parameter_shapes().values())
    assert elements == PUBLISHED[name][3]
    assert shape.window is None
    settings = read_settings([str(EXAMPLE)], "plan")
    files = read_deepspeed_files(settings.train, Facts(7, shape, True))
    asked, _ = asked_way(settings, shape, files, 7, on_gpu=True)
    weights = next(term for term in asked.peak.terms if term.name == "weights, shard")
    # A seventh of each tensor in bf16; those below DeepSpeed's threshold are whole beside it.
    assert 2 * elements / 7 < weights.bytes < 1.7 * 2 * elements / 7


def test_the_qwen3_example_is_planned_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    folder = ROOT / "examples" / "qwen3-8b"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ours = published("Qwen3-8B") | {"max_window_layers": 36}
    assert {key: config[key] for key in ours} == ours
    words = ["--model_name_or_path", str(folder), "--num_gpus", "7", "--gpu_memory", "24"]
    assert plan([str(EXAMPLE), *words]) == 0
    assert "fits: +" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("qwen2_moe", "a mixture of experts"),
        ("qwen3_moe", "a mixture of experts"),
        ("mixtral", "a mixture of experts"),
        ("gpt_oss", "a mixture of experts"),
        ("gemma", "of another block"),
        ("gemma2", "of another block"),
        ("gemma3_text", "of another block"),
        ("qwen3_next", "gated delta net"),
        ("qwen3_5", "gated delta net"),
        ("qwen3_5_moe", "gated delta net"),
        ("qwen2_vl", "images and text"),
        ("qwen2_5_vl", "images and text"),
        ("qwen3_vl", "images and text"),
        ("qwen3_vl_moe", "images and text"),
        ("qwen2_5_omni", "images, sound and text"),
        ("qwen2_audio", "sound and text"),
        ("mistral3", "images and text"),
        ("mllama", "images and text"),
        ("phi3", "it is not known"),
        (None, "it is not known"),
        (["llama"], "it is not known"),
    ],
)
def test_other_models_are_refused_by_name_in_one_line(model_type: object, reason: str) -> None:
    with pytest.raises(Exception, match="model_type is") as refused:
        shape_from_config({**published("Qwen3-8B"), "model_type": model_type}, "DIR/config.json")
    (line,) = refused.value.problems  # type: ignore[attr-defined]
    assert line.startswith(f"DIR/config.json: model_type is {model_type!r}: ") and reason in line
    assert "Llama 3, Qwen2, Qwen2.5, Qwen3 and Mistral are trained" in line


def test_a_model_with_a_part_for_images_is_refused_as_such() -> None:
    config = {**published("Qwen3-8B"), "model_type": "new_one", "vision_config": {}}
    with pytest.raises(Exception, match="it is a model of images and text"):
        shape_from_config(config)


@pytest.mark.parametrize(
    ("name", "changes", "window"),
    [
        ("Mistral-7B-v0.3", {}, None),
        ("Mistral-7B-v0.3", {"sliding_window": 4096}, 4096),
        ("Mistral-7B-v0.3", {"sliding_window": "absent"}, 4096),
        ("Qwen2.5-7B", {}, None),
        ("Qwen2.5-7B", {"use_sliding_window": True}, 131072),
        ("Qwen3-8B", {"use_sliding_window": True, "sliding_window": 1024}, 1024),
        ("Qwen3-8B", {"use_sliding_window": True}, None),
    ],
)
def test_windows_are_those_of_transformers(
    name: str, changes: dict[str, Any], window: int | None
) -> None:
    config = {k: v for k, v in {**published(name), **changes}.items() if v != "absent"}
    assert shape_from_config(config).window == window
    kwargs = {key: value for key, value in config.items() if key != "model_type"}
    assert AutoConfig.for_model(config["model_type"], **kwargs).sliding_window == window


def test_documents_longer_than_the_window_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**published("Mistral-7B-v0.3"), "sliding_window": 2048}
    shape = shape_from_config(config)
    assert window_problem(shape, 2048, "cutoff_len") == []
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words = [str(EXAMPLE), "--model_name_or_path", str(tmp_path), "--gpu_memory", "80"]
    assert plan([*words, "--cutoff_len", "2049"]) == 2
    said = capsys.readouterr().err
    assert "cutoff_len: 2,049 tokens exceed the 2,048" in said and "lower cutoff_len" in said


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_a_file_leaves_out_is_what_transformers_takes(model_type: str) -> None:
    sizes = {"vocab_size": 128, "hidden_size": 4096, "num_hidden_layers": 1}
    sizes |= {"intermediate_size": 64, "num_attention_heads": 32}
    theirs = AutoConfig.for_model(model_type, **sizes)
    mine = shape_from_config({"model_type": model_type, **sizes})
    assert mine.num_kv_heads == theirs.num_key_value_heads
    assert mine.head_dim == getattr(theirs, "head_dim", 4096 // 32)
    assert mine.rms_norm_eps == theirs.rms_norm_eps
    assert mine.tied == theirs.tie_word_embeddings
    assert mine.rope.theta == theirs.rope_parameters["rope_theta"]
    assert mine.window == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_hub_form_and_transformers5_form_mean_the_same(model_type: str) -> None:
    new = random_model(model_type).config.to_dict()
    old = {
        key: value for key, value in new.items() if key not in ("rope_parameters", "layer_types")
    }
    scaling = {k: v for k, v in new["rope_parameters"].items() if k != "rope_theta"}
    old |= {"rope_theta": new["rope_parameters"]["rope_theta"], "rope_scaling": scaling}
    assert shape_from_config(old) == shape_from_config(new)
