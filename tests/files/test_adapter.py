"""Adapters: PEFT reads what is written, to the bit and to the logit; broken ones are refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from minilora.data.tokenizer_files import read_tokenizer_files
from minilora.files.adapter import (
    WEIGHTS,
    check_adapter,
    read_adapter,
    write_adapter,
)
from minilora.files.adapter_config import CONFIG, read_adapter_shape
from minilora.files.model_config import read_model_config
from minilora.files.tensor_parts import TensorPart
from minilora.files.weights import read_checkpoint, read_parts
from minilora.model.llama import Llama
from minilora.model.lora import inject, lora_parameters
from minilora.model.lora_shape import LoraShape
from minilora.model.tiles import document_tiles
from minilora.settings.errors import RequestError, RunError
from tests.support.oracle import base_model

TARGETS = ("q_proj", "o_proj", "up_proj")
# The fields of PEFT 0.13.0's LoraConfig and its parents; a newer key makes it fail.
PEFT_0_13 = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layer_replication", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip


@pytest.fixture
def written(tiny: Path, tmp_path: Path) -> tuple[Path, LoraShape, dict[str, Tensor]]:
    lora = LoraShape(3, 12, 0.0, TARGETS)
    shapes = lora.parameter_shapes(read_checkpoint(read_model_config(tiny)).shape)
    tensors = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    write_adapter(tmp_path / "adapter", tensors, lora, read_tokenizer_files(tiny))
    return tmp_path / "adapter", lora, tensors


def test_peft_gives_the_same_logits(
    tiny: Path, written: tuple[Path, LoraShape, dict[str, Tensor]]
) -> None:
    folder, lora, tensors = written
    checkpoint = read_checkpoint(read_model_config(tiny))
    model = Llama(checkpoint.shape)
    read_parts(
        checkpoint, [TensorPart(name, 0, p.data.view(-1)) for name, p in model.named_parameters()]
    )
    inject(model, lora, seed=0)
    for name, parameter in lora_parameters(model):
        parameter.data.copy_(tensors[name])
    ids = torch.randint(0, checkpoint.shape.vocab_size, (30,))
    with torch.no_grad():
        base = base_model(tiny)
        without = base(ids[None]).logits[0]
        theirs = PeftModel.from_pretrained(base, folder)(ids[None]).logits[0]
        tiles = document_tiles(checkpoint.shape, [(30,)], 0, torch.empty(0))
        mine = model.logits(ids, tiles)
    assert (theirs - without).abs().max() > 0.1, "the adapter must change something"
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_names_and_keys_are_exactly_pefts(
    tiny: Path, written: tuple[Path, LoraShape, dict[str, Tensor]]
) -> None:
    folder, _, tensors = written
    assert set(load_file(folder / WEIGHTS)) == {
        f"base_model.model.model.layers.{layer}.{module}.lora_{ab}.weight"
        for layer in (0, 1)
        for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
        for ab in "AB"
    }
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    assert set(config) == PEFT_0_13
    assert (config["r"], config["lora_alpha"]) == (3, 12)
    assert config["target_modules"] == ["q_proj", "o_proj", "up_proj"]
    beside = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, *beside}
    assert all((folder / name).read_bytes() == (tiny / name).read_bytes() for name in beside)


def test_the_tokenizer_is_kept_beside_the_adapter(tmp_path: Path) -> None:
    """All that transformers' save_pretrained writes of one with a template."""
    files = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    files |= {"chat_template.jinja"}
    base = tmp_path / "base"
    base.mkdir()
    for name in files:
        (base / name).write_text(name)
    write_adapter(tmp_path / "out", {}, LoraShape(3, 12, 0.0, TARGETS), read_tokenizer_files(base))
    held = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert held.keys() == {*files, WEIGHTS, CONFIG}
    assert all(held[name] == name for name in files)


def test_the_tokenizer_is_read_once_for_all_adapters_of_a_run(tiny: Path, tmp_path: Path) -> None:
    """What becomes of the base's files while a run goes on changes none of its adapters."""
    folder = Path(shutil.copytree(tiny, tmp_path / "base"))
    base = read_tokenizer_files(folder)
    before = {name: (tiny / name).read_bytes() for name in base.contents}
    shutil.rmtree(folder)
    for out in (tmp_path / "one", tmp_path / "two"):
        write_adapter(out, {}, LoraShape(3, 12, 0.0, TARGETS), base)
        assert {name: (out / name).read_bytes() for name in before} == before
    assert read_tokenizer_files(folder).contents == {}


def test_a_tokenizer_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(RequestError, match="tokenizer.json: not a plain file"):
        read_tokenizer_files(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").symlink_to("/proc/self/mem")
    with pytest.raises(RequestError, match="tokenizer_config.json: input/output error"):
        read_tokenizer_files(tmp_path)


def test_reading_gives_back_what_was_written(
    tiny: Path, written: tuple[Path, LoraShape, dict[str, Tensor]]
) -> None:
    folder, lora, tensors = written
    shape = read_checkpoint(read_model_config(tiny)).shape
    assert read_adapter_shape(folder, shape, 0.0) == lora
    held = read_adapter(folder, lora.parameter_shapes(shape))
    assert held.keys() == tensors.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())


def test_tensors_of_another_model_are_refused(
    tiny: Path, written: tuple[Path, LoraShape, dict[str, Tensor]]
) -> None:
    folder, lora, _ = written
    expected = lora.parameter_shapes(read_checkpoint(read_model_config(tiny)).shape)
    held = load_file(folder / WEIGHTS)
    first, second, third, *_ = sorted(held)
    save_file(
        {
            **{name: tensor for name, tensor in held.items() if name != first},
            second: torch.full_like(held[second], torch.nan),
            third: torch.zeros(2, 2),
            "stranger": torch.zeros(1),
        },
        folder / WEIGHTS,
    )
    with pytest.raises(RequestError) as refused:
        read_adapter(folder, expected)
    text = str(refused.value)
    assert len(refused.value.problems) == 4
    assert f"{first} is missing" in text and "stranger is not in the model" in text
    assert f"{second} holds NaN" in text and f"{third} has shape [2, 2]" in text
    (folder / WEIGHTS).write_bytes(b"nonsense")
    with pytest.raises(RequestError, match="not a whole safetensors file"):
        read_adapter(folder, expected)


def test_the_check_after_writing_finds_every_fault(
    written: tuple[Path, LoraShape, dict[str, Tensor]],
) -> None:
    folder, _, tensors = written
    check_adapter(folder, tensors)
    held = load_file(folder / WEIGHTS)
    name = next(iter(held))
    faults = {
        "differ": {key: tensor for key, tensor in held.items() if key != name},
        "differs from what was trained": {**held, name: held[name] + 1},
    }
    for message, tampered in faults.items():
        save_file(tampered, folder / WEIGHTS)
        with pytest.raises(RunError, match=message):
            check_adapter(folder, tensors)
    for wrong in (torch.full((3, 32), torch.nan), torch.empty(0)):
        broken = {**tensors, next(iter(tensors)): wrong}
        write_adapter(folder, broken, written[1], read_tokenizer_files(folder))
        with pytest.raises(RunError, match="empty or not finite"):
            check_adapter(folder, broken)
    (folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(RunError, match="cannot be read back"):
        check_adapter(folder, tensors)
