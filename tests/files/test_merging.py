"""Adapters exported for servers, and adapters that are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.support.merging import (
    PATTERNS,
    PLAIN,
    STABILISED,
    TARGETS,
    logits,
    make,
    merge,
    model_of,
    tensors_of,
)


@pytest.fixture(params=["plain", "tied"])
def base(request: pytest.FixtureRequest, tiny: Path, tiny_tied: Path) -> Path:
    return tiny if request.param == "plain" else tiny_tied


@pytest.mark.parametrize("case", ["patterns", "rs", "several"])
def test_an_exported_adapter_needs_no_more_than_one_rank_and_one_alpha(
    base: Path, tmp_path: Path, case: str
) -> None:
    parts = {
        "patterns": [(PATTERNS, [0, 1])],
        "rs": [(STABILISED, [0])],
        "several": [(PATTERNS, [0, 1]), (STABILISED, [1])],
    }[case]
    adapters = ",".join(
        str(make(base, tmp_path / str(index), **{**lora, "layers_to_transform": layers}))
        for index, (lora, layers) in enumerate(parts)
    )
    assert merge(base, adapters, tmp_path / "merged") == 0
    assert merge(base, adapters, tmp_path / "exported", "--adapter_only") == 0
    config = json.loads((tmp_path / "exported/adapter_config.json").read_text(encoding="utf-8"))
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and not config["use_rslora"]
    held = load_file(tmp_path / "exported/adapter_model.safetensors")
    # What vLLM asks of an adapter: no other method, and no tensor but pairs of linear layers.
    assert config["bias"] == "none" and not config["use_dora"] and not config["modules_to_save"]
    known = re.compile(rf"base_model\.model\.model\.layers\.\d+\.\w+\.({'|'.join(TARGETS)})"
                       r"\.lora_[AB]\.weight")  # fmt: skip
    assert all(known.fullmatch(name) for name in held)
    old = tensors_of(base)
    new = tensors_of(tmp_path / "merged")
    for name in new:  # as a server reads it
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in held:
            a = held[f"{layer}.lora_A.weight"]
            b = held[f"{layer}.lora_B.weight"]
            assert len(a) == config["r"] == b.shape[1]
            merged = old[name] + config["lora_alpha"] / config["r"] * b @ a
            torch.testing.assert_close(merged, new[name], atol=1e-6, rtol=0)
        else:
            assert torch.equal(old[name], new[name])
    found = logits(PeftModel.from_pretrained(model_of(base), tmp_path / "exported"))
    expected = logits(model_of(tmp_path / "merged"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_plain_adapter_is_exported_as_it_is(tiny: Path, tmp_path: Path) -> None:
    adapter = make(tiny, tmp_path / "adapter", **PLAIN)
    assert merge(tiny, adapter, tmp_path / "exported", "--adapter_only") == 0
    old = load_file(adapter / "adapter_model.safetensors")
    new = load_file(tmp_path / "exported/adapter_model.safetensors")
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    config = json.loads((tmp_path / "exported/adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (4, 8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"modules_to_save": ["lm_head"]}, "base_model.model.lm_head.weight is missing"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes the base weights"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', not LORA"),
        ({"r": 8}, "gate_proj.lora_A.weight has shape [4, 32], the model needs [8, 32]"),
        ({"r": None}, "r is None; a whole number of at least 1 is needed"),
    ],
)
def test_other_adapters_are_refused(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, Any],
    message: str,
) -> None:
    path = make(tiny, tmp_path / "adapter", **PLAIN) / "adapter_config.json"
    held = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**held, **config}), encoding="utf-8")
    assert merge(tiny, path.parent, tmp_path / "merged") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_wrong_tensors_are_named_all_at_once(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tiny, tmp_path / "adapter", **PLAIN) / "adapter_model.safetensors"
    held = load_file(path)
    prefix = "base_model.model.model.layers"
    held[f"{prefix}.7.mlp.up_proj.lora_A.weight"] = torch.ones(4, 32)
    del held[f"{prefix}.1.self_attn.q_proj.lora_B.weight"]
    held[f"{prefix}.0.self_attn.k_proj.lora_B.weight"][0, 0] = torch.nan
    save_file(held, path)
    capsys.readouterr()
    assert merge(tiny, path.parent, tmp_path / "merged") == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {path}: {prefix}.0.self_attn.k_proj.lora_B.weight holds NaN or infinite numbers",
        f"error: {path}: {prefix}.1.self_attn.q_proj.lora_B.weight is missing",
        f"error: {path}: {prefix}.7.mlp.up_proj.lora_A.weight is not in the model",
    ]
    path.write_bytes(path.read_bytes()[:-10])
    assert merge(tiny, path.parent, tmp_path / "merged") == 2
    assert "not a whole safetensors file" in capsys.readouterr().err
