"""The plan of weights in 4 bits: bytes for memory, elements for DeepSpeed's rules."""

from __future__ import annotations

import re
from typing import Any

import pytest

from minilora.files.deepspeed_file import Facts, read_deepspeed_files
from minilora.memory.peak import GIB, PeakMemory, peak_memory
from minilora.memory.spare import Open, use_spare_memory
from minilora.memory.ways import Way, asked_way, recommended, ways
from minilora.memory.zero3_gathers import Gathers, Module, Zero
from minilora.plan import main as plan
from minilora.settings.command_line import read_settings
from tests.support.article import FILES, ROOT, article, example_shape, files_for

PACKED = files_for(example_shape("llama-3.1-8b", 4))
CARD = int(23.64 * GIB)  # of a card of 24 GB
BLOCK = 218_103_808  # weights of an 8B block
WHOLE = 2 * 525_336_576 + (2 * 32 + 1) * 4096  # embedding, head and norms of the 8B model


def needs(**changes: Any) -> PeakMemory:
    return peak_memory(article(quantization_bit=4, **changes))


def size_of(peak: PeakMemory, name: str) -> int:
    return sum(term.bytes for term in peak.terms if term.name == name)


def test_packed_weights_take_17_bits_of_32_and_the_others_16() -> None:
    replica = needs(zero=PACKED["zero0"])
    assert size_of(replica, "weights, replica, packed") == 32 * BLOCK * 17 // 32
    assert size_of(replica, "weights, replica") == 2 * WHOLE

    shard = needs()
    assert size_of(shard, "weights, shard, packed") == pytest.approx(BLOCK * 17 / 7, rel=1e-6)
    # Norms are whole on every GPU besides.
    whole = 2 * (WHOLE / 7 + 65 * 4096)
    assert size_of(shard, "weights, shard") == pytest.approx(whole, rel=1e-6)
    # The files are in bf16 all the same.
    host = {term.name: term.bytes for term in shard.host}
    assert host["page cache of the files"] == 2 * 8_030_261_248


def test_a_block_is_unpacked_while_it_computes() -> None:
    """All of it in backward, once; nothing while the head computes, or if nothing is packed."""
    at_block = needs(zero=PACKED["zero0"], gather_tokens=2048)
    assert at_block.peak_moment == "recompute, block 31"
    assert size_of(at_block, "block's weights, unpacked") == 2 * BLOCK
    assert size_of(needs(), "block's weights, unpacked") == 0, "at the head"
    assert size_of(peak_memory(article(gather_tokens=2048)), "block's weights, unpacked") == 0


def test_what_is_gathered_is_counted_in_bytes_and_by_its_elements() -> None:
    """A packed block of 4 elements and a head of 3: the bucket of 4 elements is full with it."""
    modules = [Module("block 0", {"a": 2, "b": 2}, {}, 0), Module("head", {"head": 3}, {})]
    zero = Zero(stage=3, stage3_prefetch_bucket_size=4, stage3_max_reuse_distance=0)
    found = Gathers(modules, 2, zero, 1, {"a": 1, "b": 1, "head": 2})
    assert found.gathered == 2 + 2 + 3 * 2
    assert [visit.own for visit in found.visits] == [4, 6]
    assert [visit.held for visit in found.visits] == [4 + 6, 6]


@pytest.mark.parametrize(
    ("changes", "gib", "gigabytes"),
    [
        ({}, 12.57, 9.5),
        ({"gather_tokens": 8192}, 5.93, 38.1),
        ({"gather_tokens": 2048, "zero": PACKED["zero0"]}, 8.46, 0),
        ({"gather_tokens": 2048, "zero": PACKED["zero0"], "keep_blocks": 32}, 16.63, 0),
        ({"model": "llama-3.1-70b", "offload_activations": True}, 13.66, 76.9),
        ({"model": "llama-3.1-70b", "gather_tokens": 8192}, 22.27, 307.7),
    ],
)
def test_the_numbers_that_are_published(
    changes: dict[str, Any], gib: float, gigabytes: float
) -> None:
    peak = needs(**changes)
    assert round(peak.total / GIB, 2) == gib
    assert round(peak.gathered / 1e9, 1) == gigabytes


def test_a_third_is_gathered_and_never_for_each_micro_batch() -> None:
    assert needs().gathered < 0.33 * peak_memory(article()).gathered
    assert needs(step_tokens=65536).gathered == needs().gathered


@pytest.mark.slow
def test_24_gb_are_used_best_by_whole_weights_in_spans_of_a_tile() -> None:
    found = recommended(ways(Way("zero3", article(quantization_bit=4)), PACKED), CARD)
    assert found and (found.file, found.blocks) == ("zero0", "saved")
    assert (found.job.gather_tokens, found.job.tile_tokens) == (2048, 2048)
    kept = use_spare_memory(article(quantization_bit=4, zero=PACKED["zero0"]), CARD, Open())
    assert (kept.keep_blocks, kept.gather_tokens) == (32, 2048)

    in_bf16 = recommended(ways(Way("zero3", article()), FILES), CARD)
    assert in_bf16 and (in_bf16.file, in_bf16.blocks) == ("zero2", "recomputed")


def says(capsys: pytest.CaptureFixture[str], example: str, *words: str) -> tuple[int, str]:
    model = example.partition("_7x")[0].replace("llama31_", "llama-3.1-")
    base = ["--model_name_or_path", str(ROOT / f"examples/{model}")]
    code = plan([str(ROOT / f"examples/{example}.yaml"), *base, *words])
    return code, capsys.readouterr().out


def test_the_70b_example_fits_seven_cards_of_24_gb() -> None:
    settings = read_settings([str(ROOT / "examples/llama31_70b_7x4090.yaml")], "train")
    shape = example_shape("llama-3.1-70b", settings.model.quantization_bit)
    ds_configs = read_deepspeed_files(settings.train, Facts(7, shape, bf16=True))
    asked, _ = asked_way(settings, shape, ds_configs, 7, on_gpu=True)
    assert asked.file == "zero3" and round(asked.peak.total / GIB, 2) == 22.27 < 23.64


@pytest.mark.slow
def test_70b_on_six_cards_of_16_gb_is_told_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    code, output = says(capsys, "llama31_70b_7x4090", "--num_gpus", "6", "--gpu_memory", "16")
    assert code == 1 and "nearest settings that fit:" in output
    offers = output.partition("nearest settings that fit:\n")[2].splitlines()
    assert len(offers) == 3 and all(float(line.split()[0]) < 15.76 for line in offers)
    assert "offload_activations: true" in output


@pytest.mark.slow
def test_where_bf16_does_not_fit_4_bits_are_offered(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--num_gpus", "7", "--gpu_memory", "13"]
    code, output = says(capsys, "llama31_8b_7x4090", *words)
    assert code == 1 and re.search(r"^ +12\.57 GiB  quantization_bit: 4$", output, re.MULTILINE)
    code, output = says(capsys, "llama31_8b_7x4090", *words, "--quantization_bit", "4")
    assert code == 0 and "12.57 GiB" in output and "quantization_bit" not in output
