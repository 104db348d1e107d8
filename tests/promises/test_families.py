"""Qwen2, Qwen3 and Mistral as files and as answers: adapters, merging, the cache, generation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from minilora.data.tokenizer_files import read_tokenizer_files
from minilora.files.adapter import WEIGHTS, read_adapter, write_adapter
from minilora.files.adapter_config import read_adapter_shape
from minilora.files.model_config import read_model_config
from minilora.files.weights import read_checkpoint
from minilora.generate import load
from minilora.generate import main as generate
from minilora.model.decode import CachedTile
from minilora.model.llama import Llama
from minilora.model.tiles import document_tiles
from tests.support.families import TINY
from tests.support.merging import PLAIN, logits, make, merge, model_of, tensors_of


@pytest.fixture(params=TINY)
def base(request: pytest.FixtureRequest, family_checkpoints: dict[str, Path]) -> Path:
    return family_checkpoints[request.param]


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def adapter(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> Path:
    """An adapter that PEFT wrote for this base, its B random."""
    torch.manual_seed(5)
    return make(base, tmp_path / "adapter", std=0.3, **PLAIN, use_dora=request.param)


def our_model(base: Path, adapter: Path | None) -> Llama:
    return load(read_checkpoint(read_model_config(base)), adapter)


def our_logits(base: Path, adapter: Path | None) -> Tensor:
    """As `merging.logits`."""
    model = our_model(base, adapter)
    tiles = document_tiles(model.shape, [(100,), (100,)], 0, torch.empty(0))
    with torch.inference_mode():
        return model.logits(torch.arange(7, 207), tiles).view(2, 100, -1)


def check_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


def test_an_adapter_of_pefts_gives_the_same_logits_and_is_written_back(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    plain = logits(model_of(base))
    expected = logits(PeftModel.from_pretrained(model_of(base), adapter))
    assert (expected - plain).abs().max() > 0.1
    check_close(our_logits(base, None), plain)
    check_close(our_logits(base, adapter), expected)

    shape = read_model_config(base).shape
    lora = read_adapter_shape(adapter, shape, 0.0)
    tensors = read_adapter(adapter, lora.parameter_shapes(shape))
    write_adapter(tmp_path / "again", tensors, lora, read_tokenizer_files(base))
    old, new = load_file(adapter / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    again = logits(PeftModel.from_pretrained(model_of(base), tmp_path / "again"))
    assert torch.equal(again, expected)


def test_the_merged_model_computes_what_the_adapter_does(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    assert merge(base, adapter, tmp_path / "merged") == 0
    expected = logits(PeftModel.from_pretrained(model_of(base), adapter))
    check_close(logits(model_of(tmp_path / "merged")), expected)
    old, new = tensors_of(base), tensors_of(tmp_path / "merged")
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert torch.equal(tensor, new[name]) != ("_proj.weight" in name), name


def test_logits_with_the_cache_equal_those_without(base: Path) -> None:
    model = our_model(base, None)
    documents = [torch.randint(0, 512, (length,)).tolist() for length in (17, 6)]
    with torch.inference_mode():
        tiles = document_tiles(model.shape, [(17, 6)], 0, torch.empty(0))
        whole = model.logits(torch.tensor(sum(documents, [])), tiles).split([17, 6])
    tile = CachedTile(model, [17, 6])
    found = tile.next_logits([documents[0][:14], documents[1][:3]])
    for step in range(4):
        torch.testing.assert_close(found[0], whole[0][13 + step], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[1], whole[1][2 + step], atol=1e-4, rtol=1e-4)
        if step < 3:
            found = tile.next_logits([[documents[0][14 + step]], [documents[1][3 + step]]])


def test_answers_are_those_of_transformers_and_peft(
    base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    words = ["--model_name_or_path", str(base), "--adapter_name_or_path", str(adapter)]
    for prompt in ("Who wrote this?", "What is the answer?"):
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        tokens = peft.generate(**asked, do_sample=False, max_new_tokens=16)[0]
        expected = tokenizer.decode(
            tokens[asked["input_ids"].shape[1] :],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        assert generate([*words, "--prompt", prompt, "--max_new_tokens", "16"]) == 0
        assert capsys.readouterr().out == expected + "\n"
