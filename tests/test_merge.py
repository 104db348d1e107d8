"""Merged models and exported adapters held against PEFT; the files held against the base's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from minilora.files.weights import INDEX, read_checkpoint
from minilora.merge import main
from minilora.tiny import TinyShape, write_tiny

MakeAdapter = Callable[..., Path]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
PATTERNS = {
    **PLAIN,
    "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
    "alpha_pattern": {"k_proj": 3, r"layers\.0\..*down_proj": 20},
}
STABILISED = {
    "r": 5,
    "lora_alpha": 7,
    "target_modules": ["q_proj", "down_proj"],
    "use_rslora": True,
}


@pytest.fixture(params=["plain", "tied"])
def base(request: pytest.FixtureRequest, tiny: Path, tiny_tied: Path) -> Path:
    return tiny if request.param == "plain" else tiny_tied


@pytest.fixture
def make(tmp_path: Path) -> MakeAdapter:
    """Adapters with random B, written by PEFT."""

    def make(base: Path, name: str, std: float = 0.05, **lora: Any) -> Path:
        config = LoraConfig(task_type="CAUSAL_LM", **lora)
        peft = get_peft_model(model_of(base), config)
        for parameter_name, parameter in peft.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=std)
        peft.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: Any) -> Tensor:
    token_ids = torch.arange(7, 207).view(2, 100)
    with torch.inference_mode():
        found: Tensor = model(token_ids).logits
    return found


def merge(base: Path, adapters: str | Path, folder: Path, *more: str) -> int:
    given = ["--model_name_or_path", base, "--adapter_name_or_path", adapters]
    return main([str(part) for part in (*given, "--export_dir", folder, *more)])


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("lora", [PLAIN, PATTERNS, STABILISED], ids=["plain", "patterns", "rs"])
def test_the_merged_model_computes_what_the_adapter_does(
    base: Path, make: MakeAdapter, tmp_path: Path, lora: dict[str, Any]
) -> None:
    adapter = make(base, "adapter", **lora)
    assert merge(base, adapter, tmp_path / "merged") == 0
    expected = logits(PeftModel.from_pretrained(model_of(base), adapter))
    merged, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values())
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    assert (logits(model_of(base)) - expected).abs().max() > 0.1


def test_several_adapters_are_added_as_peft_adds_them(
    tiny: Path, make: MakeAdapter, tmp_path: Path
) -> None:
    first, second = make(tiny, "one", **PLAIN), make(tiny, "two", **STABILISED)
    both = f"{first},{second}"
    assert merge(tiny, both, tmp_path / "merged", "--adapter_weights", "0.5,0.25") == 0
    assert merge(tiny, both, tmp_path / "whole") == 0
    expected = {}
    for name, weights in (("merged", [0.5, 0.25]), ("whole", [1.0, 1.0])):
        peft = PeftModel.from_pretrained(model_of(tiny), first, adapter_name="one")
        peft.load_adapter(second, adapter_name="two")
        peft.add_weighted_adapter(["one", "two"], weights, "sum", combination_type="cat")
        peft.set_adapter("sum")
        expected[name] = logits(peft)
        found = logits(model_of(tmp_path / name))
        torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=0)
    assert (expected["merged"] - expected["whole"]).abs().max() > 0.1


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_half_precision_is_rounded_once(
    make: MakeAdapter, tmp_path: Path, dtype: str, bits: int
) -> None:
    folder = tmp_path / "base"
    write_tiny(folder, TinyShape(hidden=64, layers=1, dtype=dtype, shard_bytes=50_000))
    adapter = make(folder, "adapter", std=0.01, **PLAIN)
    assert merge(folder, adapter, tmp_path / "merged") == 0
    old, new, lora = (
        tensors_of(folder),
        tensors_of(tmp_path / "merged"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    changed = 0
    for name, tensor in old.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        assert new[name].dtype == tensor.dtype
        if f"{layer}.lora_A.weight" in lora:
            a, b = (lora[f"{layer}.lora_{part}.weight"].double() for part in "AB")
            exact = tensor.double() + 2 * b @ a
            limit = exact.abs() * 2.0**-bits + 2.0**-24  # half of the last place, and fp32's sum
            assert ((new[name].double() - exact).abs() <= limit).all()
            changed += int((new[name] != tensor).sum())
    assert changed > 1000


def test_what_no_adapter_touches_is_the_same_to_the_byte(
    base: Path, make: MakeAdapter, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    others = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors")
    for name in (*others, "old.pth", "adapter_config.json"):
        (folder / name).write_text("not for copying", encoding="utf-8")
    (folder / "original").mkdir()
    (folder / "LICENSE").write_text("as is", encoding="utf-8")
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    if "lm_head.weight" not in index["weight_map"]:  # a tied head may lie in a file of its own
        index["weight_map"]["lm_head.weight"] = "model-head.safetensors"
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
        head = {"lm_head.weight": tensors_of(folder)["model.embed_tokens.weight"]}
        save_file(head, folder / "model-head.safetensors", metadata={"format": "pt", "by": "us"})
    adapter = make(base, "adapter", r=4, target_modules=["v_proj", "up_proj"])
    merged = tmp_path / "merged"
    assert merge(folder, adapter, merged) == 0

    files = set(index["weight_map"].values())
    kept = {path.name for path in base.iterdir()} | {"LICENSE"} | files
    assert {path.name for path in merged.iterdir()} == kept and len(files) > 2
    for name in kept - files:
        assert (merged / name).read_bytes() == (folder / name).read_bytes()
    targets = re.compile(r".*\.(v|up)_proj\.weight")
    stored = read_checkpoint(folder).tensors
    assert read_checkpoint(merged).tensors.keys() == stored.keys()
    for name in files:
        old, new = (bytearray((place / name).read_bytes()) for place in (folder, merged))
        for tensor_name, tensor in stored.items():
            if tensor.file.name == name and targets.fullmatch(tensor_name):
                end = tensor.start + torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
                assert old[tensor.start : end] != new[tensor.start : end]
                old[tensor.start : end] = new[tensor.start : end] = b""
                padding = bytes(end - tensor.start)  # keeps what follows in its place
                old[tensor.start : tensor.start], new[tensor.start : tensor.start] = (
                    padding,
                    padding,
                )
        assert old == new
    AutoTokenizer.from_pretrained(merged)


def test_one_file_without_an_index(tiny: Path, make: MakeAdapter, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    write_tiny(folder, TinyShape(hidden=32, layers=1, dtype="float32", shard_bytes=10**9))
    adapter = make(folder, "adapter", **PLAIN)
    (tmp_path / "merged").mkdir()
    assert merge(folder, adapter, tmp_path / "merged") == 0
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names
    assert "model.safetensors" in names and INDEX not in names
    expected = logits(PeftModel.from_pretrained(model_of(folder), adapter))
    torch.testing.assert_close(logits(model_of(tmp_path / "merged")), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["patterns", "rs", "several"])
def test_an_exported_adapter_needs_no_more_than_one_rank_and_one_alpha(
    base: Path, make: MakeAdapter, tmp_path: Path, case: str
) -> None:
    given = {"patterns": [PATTERNS], "rs": [STABILISED], "several": [PATTERNS, STABILISED]}[case]
    adapters = ",".join(
        str(make(base, str(index), **{**lora, "layers_to_transform": [index]}))
        for index, lora in enumerate(given)
    )
    assert merge(base, adapters, tmp_path / "merged") == 0
    assert merge(base, adapters, tmp_path / "exported", "--adapter_only") == 0
    config = json.loads((tmp_path / "exported/adapter_config.json").read_text(encoding="utf-8"))
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and not config["use_rslora"]
    held = load_file(tmp_path / "exported/adapter_model.safetensors")
    old, new = tensors_of(base), tensors_of(tmp_path / "merged")
    for name in new:  # as a server reads it
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in held:
            a, b = (held[f"{layer}.lora_{part}.weight"] for part in "AB")
            assert len(a) == config["r"] == b.shape[1]
            merged = old[name] + config["lora_alpha"] / config["r"] * b @ a
            torch.testing.assert_close(merged, new[name], atol=1e-6, rtol=0)
        else:
            assert torch.equal(old[name], new[name])
    found = logits(PeftModel.from_pretrained(model_of(base), tmp_path / "exported"))
    expected = logits(model_of(tmp_path / "merged"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_plain_adapter_is_exported_as_it_is(
    tiny: Path, make: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make(tiny, "adapter", **PLAIN)
    assert merge(tiny, adapter, tmp_path / "exported", "--adapter_only") == 0
    old, new = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (adapter, tmp_path / "exported")
    )
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    config = json.loads((tmp_path / "exported/adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (4, 8)


def test_weights_that_become_infinite_stop_it_and_leave_nothing(
    make: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, merged = tmp_path / "base", tmp_path / "merged"
    write_tiny(folder, TinyShape(hidden=32, layers=1, dtype="float16", shard_bytes=50_000))
    adapter = make(folder, "adapter", std=1e6, **PLAIN)
    assert merge(folder, adapter, merged) == 1
    assert "not finite in torch.float16 once merged" in capsys.readouterr().err
    assert list(merged.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora = True is not plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head'] is not plain LoRA"),
        ({"bias": "all"}, "bias = 'all' is not plain LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not plain LoRA"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA' is not plain LoRA"),
        ({"r": 8}, "q_proj.lora_A.weight has shape [4, 32], not [8, 32]"),
        ({"r": None}, "has r None and lora_alpha 8"),
    ],
)
def test_other_adapters_are_refused(
    tiny: Path,
    make: MakeAdapter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, Any],
    message: str,
) -> None:
    path = make(tiny, "adapter", **PLAIN) / "adapter_config.json"
    held = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**held, **config}), encoding="utf-8")
    assert merge(tiny, path.parent, tmp_path / "merged") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_wrong_tensors_are_named_all_at_once(
    tiny: Path, make: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tiny, "adapter", **PLAIN) / "adapter_model.safetensors"
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


def test_folders_and_weights_that_do_not_fit_are_refused(
    tiny: Path, make: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make(tiny, "adapter", **PLAIN)
    before = {path: path.read_bytes() for path in tiny.iterdir()}
    for folder in (tiny, adapter):
        assert merge(tiny, adapter, folder) == 2
        assert "is not empty; name a new or empty folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tiny.iterdir()} == before
    assert merge(tiny, adapter, tiny / "config.json") == 2
    assert "is a file" in capsys.readouterr().err
    for weights in ("0.5,0.5", "x", "nan", ""):
        assert merge(tiny, adapter, tmp_path / "new", "--adapter_weights", weights) == 2
        assert "is not 1 numbers" in capsys.readouterr().err
    assert merge(tiny, f"{adapter},{tmp_path / 'none'}", tiny, "--adapter_weights", "1") == 2
    assert len(capsys.readouterr().err.splitlines()) == 3  # the folder, the weights, the adapter
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_memory_stays_under_two_of_the_largest_tensors(
    tiny: Path, make: MakeAdapter, tmp_path: Path
) -> None:
    large, size = tmp_path / "large", 2**26  # bytes of the largest tensor
    shape = TinyShape(hidden=2048, intermediate=2**14, layers=5, heads=16, kv_heads=4, head_dim=128)
    write_tiny(large, TinyShape(**{**vars(shape), "shard_bytes": 3 * 10**8}))
    assert read_checkpoint(large).total_bytes > 10**9

    def peak(base: Path, name: str) -> int:
        adapter = make(base, f"adapter-{name}", **PLAIN)
        program = (
            "import resource, sys; from minilora.merge import main; code = main(sys.argv[1:]);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
        )
        given = ["--model_name_or_path", base, "--adapter_name_or_path", adapter]
        run = subprocess.run(
            [sys.executable, "-c", program, *given, "--export_dir", tmp_path / f"merged-{name}"],
            env=dict(os.environ),
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        return 1024 * int(run.stdout.split()[-1])

    used = peak(large, "large") - peak(tiny, "tiny")
    print(f"peak over the base process: {used / 2**20:.0f} MiB")
    assert used < 2 * size
