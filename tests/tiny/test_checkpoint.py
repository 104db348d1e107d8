"""The tiny checkpoint: its bytes, its form as transformers reads it, and where it is written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from minilora.files.model_config import shape_from_config
from minilora.settings.errors import RequestError
from minilora.tiny.__main__ import main
from minilora.tiny.checkpoint import TinyShape, write_tiny
from tests.support.processes import SMALL


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            assert not set(shard.keys()) & set(found)
            found |= {name: shard.get_tensor(name) for name in shard.keys()}
    return found


def test_same_shape_gives_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path / "again", SMALL)
    assert digests(tmp_path / "again") == digests(tiny)
    write_tiny(tmp_path / "other", replace(SMALL, seed=1))
    names = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    names |= {"special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"}
    mine, other = digests(tiny), digests(tmp_path / "other")
    assert {name for name in mine if mine[name] == other[name]} == names


def test_shards_and_their_index(tiny: Path) -> None:
    index = json.loads((tiny / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    count = len(files)
    assert files == [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    assert files == sorted(path.name for path in tiny.glob("*.safetensors"))
    for file in files:
        with safe_open(tiny / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            held = {name: shard.get_tensor(name) for name in shard.keys()}
        assert set(held) == {name for name, where in index["weight_map"].items() if where == file}
        assert sum(tensor.nbytes for tensor in held.values()) <= SMALL.shard_bytes or len(held) == 1
    assert index["metadata"]["total_size"] == sum(part.nbytes for part in tensors(tiny).values())


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    write_tiny(tmp_path, replace(SMALL, shard_bytes=10**9))
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", ["hub", "transformers5"])
def test_transformers_reads_every_tensor(tmp_path: Path, form: str, tied: bool) -> None:
    write_tiny(tmp_path, replace(SMALL, form=form, tied=tied))
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings is tied
    rope = model.config.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("llama3", 500000.0, 8.0)
    held = tensors(tmp_path)
    assert ("lm_head.weight" in held) is not tied
    for name, value in held.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    config = json.loads((tmp_path / "config.json").read_text())
    shapes = {name: tuple(value.shape) for name, value in held.items()}
    assert shapes == shape_from_config(config).parameter_shapes()


def test_default_is_bf16_and_of_the_given_sizes(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    assert {tensor.dtype for tensor in tensors(tmp_path).values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_no_tensor_is_trivial(tiny: Path) -> None:
    for name, value in tensors(tiny).items():
        assert value.unique().numel() > 0.9 * value.numel(), name
        assert value.isfinite().all()


def test_every_token_can_be_answered_with_confidence(tmp_path: Path) -> None:
    write_tiny(tmp_path, TinyShape(dtype="float32"))
    head = tensors(tmp_path)["lm_head.weight"]
    # The best that LoRA can do for a token: a final norm whose output is parallel to its row.
    hidden = torch.nn.functional.normalize(head, dim=1) * TinyShape().hidden ** 0.5
    assert (hidden @ head.T).softmax(dim=1).diagonal().min() > 0.99


def test_refuses_a_folder_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").write_text("precious")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(RequestError, match="name a new or empty folder"):
        write_tiny(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(RequestError, match="is a file"):
        write_tiny(tmp_path / "config.json")


def test_a_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["/proc/tiny"]) == 1
    assert "name a folder that can be written" in capsys.readouterr().err


def test_replaces_its_own_and_leaves_no_old_shard(tmp_path: Path, tiny: Path) -> None:
    write_tiny(tmp_path / "deep" / "tiny", replace(SMALL, layers=4))
    assert main([str(tmp_path / "deep" / "tiny")]) == 0
    write_tiny(tmp_path / "deep" / "tiny", SMALL)
    assert digests(tmp_path / "deep" / "tiny") == digests(tiny)
