"""Merged models held against PEFT's, their files against the base's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minilora.files.model_card import CARD
from minilora.files.model_config import read_model_config
from minilora.files.weights import INDEX, read_checkpoint
from minilora.tiny.checkpoint import TinyShape, write_tiny
from tests.support.merging import (
    PATTERNS,
    PLAIN,
    STABILISED,
    logits,
    make,
    merge,
    model_of,
    tensors_of,
)

DORA_AND_HEAD = {"use_dora": True, "modules_to_save": ["lm_head"]}


@pytest.fixture(params=["plain", "tied"])
def base(request: pytest.FixtureRequest, tiny: Path, tiny_tied: Path) -> Path:
    return tiny if request.param == "plain" else tiny_tied


@pytest.mark.parametrize("lora", [PLAIN, PATTERNS, STABILISED], ids=["plain", "patterns", "rs"])
def test_the_merged_model_computes_what_the_adapter_does(
    base: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    adapter = make(base, tmp_path / "adapter", **lora)
    assert merge(base, adapter, tmp_path / "merged") == 0
    expected = logits(PeftModel.from_pretrained(model_of(base), adapter))
    merged, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values())
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    assert (logits(model_of(base)) - expected).abs().max() > 0.1


def test_several_adapters_are_added_as_peft_adds_them(tiny: Path, tmp_path: Path) -> None:
    first = make(tiny, tmp_path / "one", **PLAIN)
    second = make(tiny, tmp_path / "two", **STABILISED)
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
def test_half_precision_is_rounded_once(tmp_path: Path, dtype: str, bits: int) -> None:
    folder = tmp_path / "base"
    write_tiny(folder, TinyShape(hidden=64, layers=1, dtype=dtype, shard_bytes=50_000))
    adapter = make(folder, tmp_path / "adapter", std=0.01, **PLAIN)
    assert merge(folder, adapter, tmp_path / "merged") == 0
    old = tensors_of(folder)
    new = tensors_of(tmp_path / "merged")
    lora = load_file(adapter / "adapter_model.safetensors")

    changed = 0
    for name, tensor in old.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        assert new[name].dtype == tensor.dtype
        if f"{layer}.lora_A.weight" in lora:
            a = lora[f"{layer}.lora_A.weight"].double()
            b = lora[f"{layer}.lora_B.weight"].double()
            exact = tensor.double() + 2 * b @ a
            limit = exact.abs() * 2.0**-bits + 2.0**-24  # half of the last place, and fp32's sum
            assert ((new[name].double() - exact).abs() <= limit).all()
            changed += int((new[name] != tensor).sum())
    assert changed > 1000

    # Its logits are those of PEFT's own merge in fp32, every weight of which is rounded once.
    peft = PeftModel.from_pretrained(model_of(folder), adapter)
    adapted = logits(peft)
    merged = peft.merge_and_unload()
    for name, parameter in merged.named_parameters():
        if name in old:
            parameter.data = parameter.data.to(old[name].dtype).float()
    found = logits(model_of(tmp_path / "merged"))
    expected = logits(merged)
    off = (expected - adapted).abs().max()  # what the rounding makes
    torch.testing.assert_close(found, expected, atol=0.02 * float(off), rtol=0)


@pytest.mark.parametrize("at", [0, -1])
def test_what_the_disk_does_not_keep_is_found_and_nothing_is_left(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at: int,
) -> None:
    adapter = make(tiny, tmp_path / "adapter", **PLAIN)
    sync = os.fsync

    def spoil(handle: int) -> None:
        place = at % os.fstat(handle).st_size
        with open(f"/proc/self/fd/{handle}", "r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1]))
        sync(handle)

    monkeypatch.setattr(os, "fsync", spoil)
    assert merge(tiny, adapter, tmp_path / "merged") == 1
    assert "does not read back as it was written; check the disk" in capsys.readouterr().err
    assert list((tmp_path / "merged").iterdir()) == []


def test_the_folder_is_a_model_once_everything_is_there(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    rename = os.replace

    def noted(old: Path, new: Path) -> None:
        moved.append(new.name)
        rename(old, new)

    monkeypatch.setattr(os, "replace", noted)
    assert merge(tiny, make(tiny, tmp_path / "adapter", **PLAIN), tmp_path / "merged") == 0
    assert moved[-1] == "config.json" and INDEX in moved
    names = {path.name for path in tiny.iterdir() if path.is_file()}
    assert set(moved) == names | {CARD}


def test_what_no_adapter_touches_is_the_same_to_the_byte(base: Path, tmp_path: Path) -> None:
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
    adapter = make(base, tmp_path / "adapter", r=4, target_modules=["v_proj", "up_proj"])
    merged = tmp_path / "merged"
    assert merge(folder, adapter, merged) == 0

    files = set(index["weight_map"].values())
    kept = {path.name for path in base.iterdir()} | {"LICENSE"} | files
    assert {path.name for path in merged.iterdir()} == kept | {CARD} and len(files) > 2
    for name in kept - files:
        assert (merged / name).read_bytes() == (folder / name).read_bytes()
    targets = re.compile(r".*\.(v|up)_proj\.weight")
    stored = read_checkpoint(read_model_config(folder)).tensors
    assert read_checkpoint(read_model_config(merged)).tensors.keys() == stored.keys()
    for name in files:
        old = bytearray((folder / name).read_bytes())
        new = bytearray((merged / name).read_bytes())
        for tensor_name, tensor in stored.items():
            if tensor.file.name == name and targets.fullmatch(tensor_name):
                size = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
                place = slice(tensor.start, tensor.start + size)
                assert old[place] != new[place]
                old[place] = new[place] = bytes(size)  # what remains must be equal
        assert old == new
    AutoTokenizer.from_pretrained(merged)


@pytest.mark.parametrize("more", [{}, DORA_AND_HEAD], ids=["lora", "dora and head"])
def test_one_file_of_large_tensors_without_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    monkeypatch.setattr("minilora.files.merging.CHUNK", 2**18)  # the head has 2**20 bytes
    folder = tmp_path / "base"
    shape = TinyShape(hidden=512, intermediate=5000, layers=1, dtype="float32", shard_bytes=10**9)
    write_tiny(folder, shape)  # its MLP is merged in several chunks
    adapter = make(folder, tmp_path / "adapter", **PLAIN, **more)
    (tmp_path / "merged").mkdir()
    assert merge(folder, adapter, tmp_path / "merged") == 0
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names | {CARD}
    assert "model.safetensors" in names and INDEX not in names
    expected = logits(PeftModel.from_pretrained(model_of(folder), adapter))
    torch.testing.assert_close(logits(model_of(tmp_path / "merged")), expected, atol=1e-5, rtol=0)


def test_weights_that_become_infinite_stop_it_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, merged = tmp_path / "base", tmp_path / "merged"
    write_tiny(folder, TinyShape(hidden=32, layers=1, dtype="float16", shard_bytes=50_000))
    adapter = make(folder, tmp_path / "adapter", std=1e6, **PLAIN)
    assert merge(folder, adapter, merged) == 1
    assert "not finite in torch.float16 once merged" in capsys.readouterr().err
    assert list(merged.iterdir()) == []


def test_folders_and_weights_that_do_not_fit_are_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make(tiny, tmp_path / "adapter", **PLAIN)
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


def test_memory_stays_under_two_of_the_largest_tensors(tiny: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    size = 2**26  # bytes of the largest tensor
    shape = TinyShape(hidden=2048, intermediate=2**14, layers=2, heads=16, kv_heads=4, head_dim=128)
    write_tiny(large, TinyShape(**{**vars(shape), "shard_bytes": 3 * 10**8}))
    assert read_checkpoint(read_model_config(large)).total_bytes > 6 * size

    def peak(base: Path, name: str) -> int:
        adapter = make(base, tmp_path / f"adapter-{name}", **PLAIN)
        # Not getrusage, whose peak a new process takes over from the one that started it.
        program = (
            "import sys; from minilora.merge import main; code = main(sys.argv[1:]);"
            "print(open('/proc/self/status').read()); sys.exit(code)"
        )
        given = ["--model_name_or_path", base, "--adapter_name_or_path", adapter]
        run = subprocess.run(
            [sys.executable, "-c", program, *given, "--export_dir", tmp_path / f"merged-{name}"],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        return 1024 * int(run.stdout.split("VmHWM:")[1].split()[0])

    used = peak(large, "large") - peak(tiny, "tiny")
    print(f"peak over the base process: {used / 2**20:.0f} MiB")
    assert used < 2 * size


def test_for_ollama_a_modelfile_lies_beside_the_merged_model(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make(tiny, tmp_path / "adapter", **PLAIN)
    merged = tmp_path / "merged"
    assert merge(tiny, adapter, merged, "--ollama", "--template", "llama3") == 0
    assert f"ollama create NAME -f {merged / 'Modelfile'}" in capsys.readouterr().out
    written = (merged / "Modelfile").read_text(encoding="utf-8")
    assert written.startswith('FROM .\nTEMPLATE """{{ if .System }}<|start_header_id|>')
    assert written.endswith('PARAMETER stop "<|eot_id|>"\n')

    assert merge(tiny, adapter, tmp_path / "no", "--ollama", "--adapter_only") == 2
    assert "--ollama needs a merged model" in capsys.readouterr().err
    assert merge(tiny, adapter, tmp_path / "no", "--template", "llama3") == 2
    assert "--template is for --ollama" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
