"""rsLoRA, DoRA, patterns and whole layers against PEFT: gradients, files, merging, memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from minilora.data.tokenizer_files import read_tokenizer_files
from minilora.files.adapter import WEIGHTS, read_adapter, write_adapter
from minilora.files.adapter_config import CONFIG, read_adapter_shape
from minilora.files.model_config import read_model_config
from minilora.files.weights import read_checkpoint
from minilora.generate import load
from minilora.model.llama import Llama
from minilora.model.lora import inject, lora_parameters
from minilora.model.lora_shape import LoraShape
from minilora.model.tiles import document_tiles
from tests.support.merging import PLAIN, logits, make, merge, model_of, tensors_of
from tests.support.models import ours, random_llama, tiles_of
from tests.support.oracle import document_loss_sum, ours_to_peft, with_lora
from tests.support.runs import VARIANTS, variant_shape

# Fields of PEFT's LoraConfig.
ADAPTERS: dict[str, dict[str, Any]] = {
    "dora": {**PLAIN, "use_dora": True},
    "dora on a pattern": {
        **PLAIN,
        "use_dora": True,
        "use_rslora": True,
        "target_modules": r".*\.1\..*(q|down)_proj",
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {r"mlp\..*": 3},
    },
    "whole": {**PLAIN, "modules_to_save": ["lm_head", "embed_tokens"]},
    "head and dora": {
        **PLAIN,
        "use_dora": True,
        "modules_to_save": ["lm_head"],
        "layers_to_transform": [1],
    },
}


def documents_of(lengths: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    ids = [torch.randint(0, 128, (length,)) for length in lengths]
    labels = [torch.cat([document[1:], torch.tensor([-100])]) for document in ids]
    for document in labels:
        document[: len(document) // 3] = -100
    return ids, labels


def pair_of(
    fields: dict[str, Any], recompute: bool = True, **changes: object
) -> tuple[Llama, PeftModel]:
    """Our model and PEFT's with the same random adapter, magnitudes near the rows' norms."""
    theirs = random_llama(**changes)
    model = ours(theirs, recompute)
    lora = variant_shape(model.shape, fields)
    peft = with_lora(theirs, lora.rank, lora.alpha, **{**fields, "targets": lora.targets})
    inject(model, lora, seed=0)
    generator = torch.Generator().manual_seed(1)
    found = dict(peft.named_parameters())
    for name, parameter in lora_parameters(model):
        noise = torch.randn(parameter.shape, generator=generator)
        theirs_now = found[ours_to_peft(name)]
        start = 0 if "lora_A" in name or "lora_B" in name else theirs_now.data
        parameter.data = start + 0.2 * noise
        theirs_now.data.copy_(parameter.data)
    assert {name for name, p in found.items() if p.requires_grad} == {
        ours_to_peft(name) for name, _ in lora_parameters(model)
    }
    return model, peft


@pytest.mark.parametrize("recompute", [True, False], ids=["again", "kept"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_every_gradient_equal_pefts(name: str, bias: bool, recompute: bool) -> None:
    model, peft = pair_of(VARIANTS[name], recompute, attention_bias=bias, mlp_bias=bias)
    ids, labels = documents_of((5, 40, 12, 3))
    tiles = tiles_of(model, (5,), (40, 12), (3,))
    model.lm_head.chunk_rows = 16
    mine = model(torch.cat(ids), torch.cat(labels), tiles, 0.5)
    mine.backward()
    total = sum(document_loss_sum(peft, *pair) for pair in zip(ids, labels, strict=True)) * 0.5
    total.backward()
    torch.testing.assert_close(mine, total, rtol=1e-5, atol=0)
    theirs = dict(peft.named_parameters())
    for parameter_name, parameter in lora_parameters(model):
        grad = theirs[ours_to_peft(parameter_name)].grad
        scale = float(grad.abs().max())
        assert scale > 1e-4, f"{parameter_name}: the comparison would show nothing"
        torch.testing.assert_close(
            parameter.grad,
            grad,
            rtol=1e-4,
            atol=1e-4 * scale,
            msg=lambda m, n=parameter_name: n,
        )
    with torch.no_grad():
        found = model.logits(torch.cat(ids), tiles)
        expected = torch.cat([peft(document[None]).logits[0] for document in ids])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


@pytest.fixture(params=ADAPTERS)
def written(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Path:
    """An adapter that PEFT wrote, every number of it moved."""
    folder = make(tiny, tmp_path / "adapter", **ADAPTERS[request.param])
    held = load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(3)
    moved = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in held.items()
    }
    save_file(moved, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def our_logits(tiny: Path, folder: Path) -> Tensor:
    """As `merging.logits`."""
    model = load(read_checkpoint(read_model_config(tiny)), folder)
    tiles = document_tiles(model.shape, [(100,), (100,)], 0, torch.empty(0))
    with torch.inference_mode():
        return model.logits(torch.arange(7, 207), tiles).view(2, 100, -1)


def test_an_adapter_of_pefts_gives_the_same_logits_and_is_written_back(
    tiny: Path, written: Path, tmp_path: Path
) -> None:
    peft = PeftModel.from_pretrained(model_of(tiny), written)
    expected = logits(peft)
    assert (expected - logits(model_of(tiny))).abs().max() > 0.1
    torch.testing.assert_close(our_logits(tiny, written), expected, rtol=1e-4, atol=1e-4)

    shape = read_checkpoint(read_model_config(tiny)).shape
    lora = read_adapter_shape(written, shape, 0.0)
    tensors = read_adapter(written, lora.parameter_shapes(shape))
    write_adapter(tmp_path / "again", tensors, lora, read_tokenizer_files(tiny))
    old, new = load_file(written / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    again = read_adapter_shape(tmp_path / "again", shape, 0.0)
    assert again.layers(shape) == lora.layers(shape), "a pattern is written as the list it means"
    in_peft = logits(PeftModel.from_pretrained(model_of(tiny), tmp_path / "again"))
    assert torch.equal(in_peft, expected)


def test_the_merged_model_computes_what_the_adapter_does(
    tiny: Path, written: Path, tmp_path: Path
) -> None:
    assert merge(tiny, written, tmp_path / "merged") == 0
    expected = logits(PeftModel.from_pretrained(model_of(tiny), written))
    torch.testing.assert_close(logits(model_of(tmp_path / "merged")), expected, atol=1e-5, rtol=0)
    old, new = tensors_of(tiny), tensors_of(tmp_path / "merged")
    whole = json.loads((written / CONFIG).read_text())["modules_to_save"] or []
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(old[name], new[name]) != any(part in name for part in whole), name


def test_what_cannot_be_combined_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dora = make(tiny, tmp_path / "dora", **ADAPTERS["dora"])
    plain, whole = (
        make(tiny, tmp_path / "plain", **PLAIN),
        make(tiny, tmp_path / "whole", **{**ADAPTERS["whole"], "target_modules": ["q_proj"]}),
    )
    for adapters, more, message in (
        (f"{dora},{plain}", [], "one adapter alone can change a layer"),
        (f"{whole},{whole}", [], "lm_head: with use_dora or modules_to_save, one adapter alone"),
        (dora, ["--adapter_weights", "0.5"], "cannot be scaled; leave --adapter_weights out"),
        (dora, ["--adapter_only"], "which such servers do not load; merge into the base instead"),
        (whole, ["--adapter_only"], "which such servers do not load; merge into the base instead"),
    ):
        assert merge(tiny, adapters, tmp_path / "merged", *more) == 2
        assert message in capsys.readouterr().err
    assert merge(tiny, f"{whole},{plain}", tmp_path / "both") == 0


def test_the_order_of_patterns_is_kept_on_disk(tiny: Path, tmp_path: Path) -> None:
    shape = read_checkpoint(read_model_config(tiny)).shape
    patterns = {"q_proj": 2, r".*_proj": 3}  # sorted, the second would win
    lora = LoraShape(4, 8, 0.0, ("q_proj", "v_proj"), rank_pattern=patterns)
    write_adapter(tmp_path, {}, lora, read_tokenizer_files(tiny))
    read = read_adapter_shape(tmp_path, shape, 0.0)
    assert read.layers(shape) == lora.layers(shape)
    assert {layer.rank for layer in lora.layers(shape).values()} == {2, 3}
