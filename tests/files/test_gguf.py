"""What llama.cpp computes with what was exported for it, against PEFT's numbers.

llama.cpp's converter writes the two halves of each pair and one alpha into a GGUF file, and reads
nothing else of adapter_config.json; its loader scales a pair by alpha / rank, the rank taken from
the tensors (convert_lora_to_gguf.py and llama-adapter.cpp).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from minilora.files.adapter import WEIGHTS
from minilora.files.adapter_config import CONFIG
from minilora.files.model_config import read_model_config
from tests.support.merging import PATTERNS, PLAIN, STABILISED, make, merge, model_of, tensors_of

WHOLE = {"use_dora": True, "modules_to_save": ["lm_head"]}


def turned(name: str, weight: Tensor, base: Path, back: bool = False) -> Tensor:
    """Rows of q and k in llama.cpp's order: the two halves of each head's rotation interleaved."""
    shape = read_model_config(base).shape
    heads = {"q_proj": shape.num_heads, "k_proj": shape.num_kv_heads}
    for layer, count in heads.items():
        if layer in name:
            halves = (count, -1, 2) if back else (count, 2, len(weight) // count // 2)
            parts = weight.reshape(*halves, weight.shape[1])
            return parts.transpose(1, 2).reshape(weight.shape)
    return weight


def write(path: Path, tensors: dict[str, Tensor], alpha: float | None) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    if alpha is not None:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def names_of(base: Path) -> Any:
    """llama.cpp's name for each of the hub's."""
    blocks = read_model_config(base).shape.num_layers
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)
    return lambda name: names.get_name(name, try_suffixes=(".weight",))


def read(path: Path) -> tuple[dict[str, Tensor], float]:
    reader = gguf.GGUFReader(path)
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    field = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA)
    return found, float(field.contents()) if field else 0.0


@pytest.mark.parametrize("lora", [PLAIN, PATTERNS, STABILISED], ids=["plain", "patterns", "rs"])
def test_adapter_only_is_what_llama_cpp_computes(
    tiny: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    adapter = make(tiny, tmp_path / "adapter", **lora)
    assert merge(tiny, adapter, tmp_path / "served", "--adapter_only") == 0
    alpha = json.loads((tmp_path / "served" / CONFIG).read_text())["lora_alpha"]
    rename, tensors = names_of(tiny), {}
    for name, tensor in load_file(tmp_path / "served" / WEIGHTS).items():
        layer, half = name.removeprefix("base_model.model.").removesuffix(".weight").split(".lora_")
        if half == "B":
            tensor = turned(layer, tensor, tiny)
        tensors[f"{rename(f'{layer}.weight')}.lora_{half.lower()}"] = tensor
    write(tmp_path / "adapter.gguf", tensors, alpha)

    found, alpha = read(tmp_path / "adapter.gguf")
    theirs = PeftModel.from_pretrained(model_of(tiny), adapter)
    for path, module in theirs.base_model.model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        a, b = (found[f"{rename(f'{path}.weight')}.lora_{half}"] for half in "ab")
        update = turned(path, b @ a * (alpha / b.shape[1]), tiny, back=True)
        torch.testing.assert_close(
            update, module.get_delta_weight("default").detach(), atol=1e-6, rtol=1e-5
        )


def test_dora_and_whole_layers_go_in_merged(tiny: Path, tmp_path: Path) -> None:
    adapter = make(tiny, tmp_path / "adapter", **PLAIN, **WHOLE)
    assert merge(tiny, adapter, tmp_path / "no", "--adapter_only") == 2
    assert merge(tiny, adapter, tmp_path / "merged") == 0
    rename = names_of(tiny)
    merged = tensors_of(tmp_path / "merged").items()
    tensors = {rename(name): turned(name, tensor, tiny) for name, tensor in merged}
    write(tmp_path / "model.gguf", tensors, None)

    found, _ = read(tmp_path / "model.gguf")
    theirs = PeftModel.from_pretrained(model_of(tiny), adapter).merge_and_unload().state_dict()
    assert len(found) == len(theirs)
    for name, expected in theirs.items():
        weight = turned(name, found[rename(name)], tiny, back=True)
        torch.testing.assert_close(weight, expected, atol=1e-5, rtol=1e-5)
