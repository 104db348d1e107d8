"""Weights in 4 bits, for whoever uses what was trained beside them: answers, merges, snapshots.

Training itself is held against PEFT in test_equals_peft.py.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from minilora.data.tokenizer_files import read_tokenizer_files
from minilora.files.adapter import (
    WEIGHTS,
    check_adapter,
    trained_in_bits,
    write_adapter,
)
from minilora.files.model_config import read_model_config
from minilora.files.snapshot import write_snapshot
from minilora.files.weights import read_checkpoint
from minilora.generate import load, main
from minilora.model.llama import Llama
from minilora.model.lora_shape import LoraShape
from minilora.model.tiles import document_tiles
from minilora.report.run_log import Totals
from minilora.settings.command_line import read_settings
from minilora.settings.errors import RequestError
from minilora.tiny.checkpoint import write_tiny
from minilora.training.checks import check
from minilora.training.engine import MOMENTS
from minilora.training.starting_point import starting_point
from tests.support.merging import merge
from tests.support.oracle import base_model, in_four_bits
from tests.support.prepared import prepared_of
from tests.support.processes import PACKABLE
from tests.support.runs import Ground


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base in bf16, and an adapter as a run with quantization_bit leaves it."""
    base = tmp_path_factory.mktemp("four_bits") / "base"
    write_tiny(base, replace(PACKABLE, dtype="bfloat16"))
    shape = read_model_config(base).shape
    lora = LoraShape(4, 8, 0.0, tuple(shape.linear_shapes()))
    generator = torch.Generator().manual_seed(4)
    tensors = {
        name: torch.randn(size, generator=generator) * 0.2
        for name, size in lora.parameter_shapes(shape).items()
    }
    write_adapter(base.with_name("adapter"), tensors, lora, read_tokenizer_files(base), 4)
    check_adapter(base.with_name("adapter"), tensors)
    return base, base.with_name("adapter")


def our_logits(base: Path, adapter: Path | None, bits: int | None, token_ids: Tensor) -> Tensor:
    model: Llama = load(read_checkpoint(read_model_config(base, bits)), adapter)
    tiles = document_tiles(model.shape, [[len(token_ids)]], 0, model.lm_head.weight)
    with torch.no_grad():
        return model.logits(token_ids, tiles)


@pytest.fixture
def token_ids() -> Tensor:
    return torch.randint(0, PACKABLE.vocab, (40,), generator=torch.Generator().manual_seed(1))


def test_answers_come_from_the_weights_that_were_trained(
    trained: tuple[Path, Path], token_ids: Tensor
) -> None:
    base, adapter = trained
    peft = PeftModel.from_pretrained(in_four_bits(base_model(base)), adapter)
    with torch.no_grad():
        expected = peft(token_ids[None]).logits[0]
    found = our_logits(base, adapter, 4, token_ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (our_logits(base, adapter, None, token_ids) - expected).abs().max() > 0.05


def test_generate_takes_the_key_and_says_where_it_is_missing(
    trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = (str(folder) for folder in trained)
    asked = ["--model_name_or_path", base, "--prompt", "Hello", "--max_new_tokens", "8"]
    asked += ["--adapter_name_or_path", adapter]
    assert main([*asked, "--quantization_bit", "4"]) == 0
    in_bits = capsys.readouterr()
    assert main(asked) == 0
    plain = capsys.readouterr()
    assert plain.out != in_bits.out
    note = (
        f"{adapter} was trained beside weights of 4 bits; --quantization_bit 4 answers with those"
    )
    assert note in plain.err and note not in in_bits.err
    assert main([*asked, "--quantization_bit", "8"]) == 2
    assert "--quantization_bit: 8 is not supported; 4 is" in capsys.readouterr().err


def test_merging_goes_into_the_weights_of_the_files_and_says_so(
    trained: tuple[Path, Path], tmp_path: Path, token_ids: Tensor, capsys: Any
) -> None:
    base, adapter = trained
    assert merge(base, adapter, tmp_path / "merged") == 0
    assert f"{adapter} was trained beside weights of 4 bits, and is now merged into those of" in (
        capsys.readouterr().out
    )
    merged = our_logits(tmp_path / "merged", None, None, token_ids)
    torch.testing.assert_close(
        merged, our_logits(base, adapter, None, token_ids), rtol=0.05, atol=0.1
    )


def test_an_adapter_of_an_unpacked_run_says_nothing(tiny: Path, ground: Ground) -> None:
    assert trained_in_bits(ground.adapters["tiny"]) is None
    header = (ground.adapters["tiny"] / WEIGHTS).read_bytes()[:40]
    assert b'{"__metadata__":{"format":"pt"}' in header


def test_a_snapshot_is_not_gone_on_from_with_other_bits(ground: Ground) -> None:
    def settings(**changes: Any) -> Any:
        job = ground.job("four-bits-snapshot", "packable", **changes)
        return read_settings([f"--{key}={value}" for key, value in job.items()], "train")

    asked = settings(quantization_bit=4)
    request, documents = check(asked), prepared_of(asked)
    begin = starting_point(request, documents.documents, documents.validation, {})
    shape = request.checkpoint.shape
    tensors = {
        name: torch.ones(size) for name, size in request.lora.parameter_shapes(shape).items()
    }
    moments = {f"{name}.{moment}": tensors[name].clone() for name in tensors for moment in MOMENTS}
    folder = write_snapshot(
        asked.output,
        replace(begin.state, step=1, log_totals=asdict(Totals(step=1))),
        tensors,
        moments,
        request.lora,
        read_tokenizer_files(asked.base),
    )

    assert trained_in_bits(folder) == "4"
    again = check(settings(quantization_bit=4, resume_from_checkpoint=folder))
    assert starting_point(again, documents.documents, documents.validation, {}).state.step == 1
    other = check(settings(resume_from_checkpoint=folder))
    with pytest.raises(RequestError) as refused:
        starting_point(other, documents.documents, documents.validation, {})
    problem, _ = refused.value.problems  # and the way on
    assert "was made with quantization_bit = 4, this run has None" in problem


def test_rows_that_cannot_be_packed_are_refused_before_anything_starts(ground: Ground) -> None:
    job = ground.job("four-bits-refused", "tiny", quantization_bit=4)
    with pytest.raises(RequestError) as refused:
        check(read_settings([f"--{key}={value}" for key, value in job.items()], "train"))
    assert "q_proj has rows of 32 weights: quantization_bit: 4 needs a multiple of 64" in (
        str(refused.value)
    )


def test_peft_loads_the_adapter_on_a_base_of_bitsandbytes(
    trained: tuple[Path, Path], token_ids: Tensor
) -> None:
    pytest.importorskip("bitsandbytes", reason="only compared with where it is installed")
    from transformers import BitsAndBytesConfig

    base, adapter = trained
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=four_bits, device_map="cpu"
    )
    # In training mode: what bitsandbytes calls for answers on a CPU computes in bf16.
    peft = PeftModel.from_pretrained(model, adapter).train()
    with torch.no_grad():
        expected = peft(token_ids[None]).logits[0]
    found = our_logits(base, adapter, 4, token_ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
