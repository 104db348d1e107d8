"""Several machines in the plan: what each host needs, what crosses, and what is recommended."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from minilora.files.deepspeed_file import Facts, read_deepspeed_files
from minilora.memory.job import MemoryJob
from minilora.memory.peak import GIB, NCCL, peak_memory
from minilora.memory.traffic import Links, Received, received, seconds, traffic, waited_for
from minilora.memory.ways import Way, recommended, ways
from minilora.memory.zero3_gathers import Zero
from minilora.plan import main
from tests.support.article import ROOT, TRAIN, article, example_shape

WEIGHTS, LORA = 8_030_261_248, 41_943_040  # elements of the 8B model, and of rank 16 on all layers
CARD = int(23.64 * GIB)


def files(quantization_bit: int | None = None) -> dict[str, Zero]:
    """The shipped files on two machines of seven GPUs."""
    shape = example_shape("llama-3.1-8b", quantization_bit)
    configs = read_deepspeed_files(TRAIN, Facts(14, shape, bf16=True, machine_ranks=7))
    return {name: Zero.of(config) for name, config in configs.items()}


FILES = files()


def job(file: str, **changes: Any) -> MemoryJob:
    """The article's job, with as much on each GPU, on two machines of seven."""
    return article(zero=FILES[file], ranks=14, machines=2, **changes)


def test_each_host_holds_what_its_own_ranks_need() -> None:
    for file in ("zero3", "zero3_nodes", "zero3_offload"):
        host = {t.name: t.bytes for t in peak_memory(job(file, offload_activations=True)).host}
        assert host["processes, estimate"] == 7 * 2 * GIB
        assert host["block inputs, pinned"] == 7 * 32 * 256 * 2**20
        assert host["page cache of the files"] == 2 * WEIGHTS


def test_a_second_shard_lies_beside_the_first() -> None:
    plain, second = peak_memory(job("zero3")), peak_memory(job("zero3_nodes"))
    sizes = {term.name: term.bytes for term in second.terms}
    assert sizes["weights, shard"] == pytest.approx(2 * WEIGHTS / 14, rel=1e-3)
    assert sizes["weights, second shard"] == pytest.approx(2 * WEIGHTS / 7, rel=1e-3)
    # LoRA's tensors lie below the threshold, and are whole on each GPU anyway.
    assert "second shard of what is trained" not in sizes
    more = second.tensors - plain.tensors
    assert more == pytest.approx(2 * WEIGHTS / 7, rel=1e-3)
    assert sizes["NCCL, estimate"] == 2 * NCCL

    trained = article(rank=128, zero=FILES["zero3_nodes"], ranks=14, machines=2)
    (term,) = [t for t in peak_memory(trained).terms if t.name == "second shard of what is trained"]
    large = 32 * 128 * (3 * 14336)  # of the MLP; q, k, v and o stay below 1,048,576
    assert term.bytes == pytest.approx(2 * large / 7, rel=1e-3)


def test_an_offloaded_second_shard_fills_the_host() -> None:
    zero = replace(FILES["zero3_offload"], zero_hpz_partition_size=7)
    for own, expected in ((FILES["zero3_offload"], 0.5), (zero, 1.5)):
        peak = peak_memory(article(zero=own, ranks=14, machines=2, on_gpu=False))
        host = {term.name: term.bytes for term in peak.host}
        assert host["weights, pinned"] == pytest.approx(expected * 2 * WEIGHTS, rel=1e-4)
        assert all("second" not in term.name for term in peak.terms)


def test_hpz_gathers_within_machines_what_plain_zero3_gathers_between_them() -> None:
    plain, second = traffic(job("zero3")), traffic(job("zero3_nodes"))
    weights, lora = peak_memory(job("zero3")).gathered, 2 * LORA
    assert plain.in_groups == 0 and second.in_groups == weights
    assert plain.among_all == weights + second.among_all
    # LoRA's new values, and the norms.
    assert second.among_all == pytest.approx(lora, rel=0.01)
    assert plain.exchanged == second.exchanged == lora
    assert received(job("zero3")) == Received(0, (plain.among_all + lora) * 13 / 14)
    assert received(job("zero3_nodes")) == Received(
        weights * 6 / 7, (second.among_all + lora) * 13 / 14
    )
    # 30.0 GB are gathered, of which each GPU has a seventh or a fourteenth.
    assert received(job("zero3_nodes")).within / 1e9 == pytest.approx(25.7, abs=0.05)
    assert seconds(job("zero3"), Links()) == pytest.approx((0, 22.4), abs=0.05)
    assert seconds(job("zero3_nodes"), Links()) == pytest.approx((2.57, 0.13), abs=0.01)


def test_on_one_machine_all_links_are_within() -> None:
    alone = replace(job("zero3"), machines=1)
    assert received(alone) == Received(received(job("zero3")).between, 0)
    between = seconds(job("zero3"), Links(80, 80))[1]
    assert seconds(alone, Links(80, 1)) == pytest.approx((between, 0))
    assert waited_for(alone, Links(80, 1)) == waited_for(job("zero3"), Links(80, 80))


def test_a_ring_is_as_slow_as_its_slowest_link() -> None:
    fast, slow = (seconds(job("zero3"), Links(80, gbps))[1] for gbps in (400, 80))
    assert fast == slow


def test_below_stage_3_gradients_and_new_weights_cross() -> None:
    for file, spans, times in (("zero2", 1, 2 * 2), ("zero2", 4, 2 * 5), ("zero0", 4, 8)):
        step = traffic(job(file, gather_tokens=32768 // spans))
        assert step == (0, 0, times * LORA)


@pytest.mark.parametrize(
    ("card", "bits", "links", "file"),
    [
        (24, None, Links(), "zero2"),  # 0.2 GB of gradients
        (24, 4, Links(), "zero0"),
        (16, None, Links(), "zero3_nodes"),  # whole weights do not fit
        (5, None, Links(), "zero3"),  # no room for a second shard
    ],
)
def test_what_is_recommended_waits_least_for_the_links(
    card: int, bits: int | None, links: Links, file: str
) -> None:
    start = article(quantization_bit=bits, zero=files(bits)["zero3"], ranks=14, machines=2)
    found = ways(Way("zero3", start), files(bits))
    limit = int(card * GIB * 0.985)
    best = recommended(found, limit, links)
    assert best
    fitting = [
        way for way in found if way.peak.total <= 0.95 * limit and not way.job.zero.offload_param
    ]
    assert waited_for(best.job, links) == min(waited_for(way.job, links) for way in fitting)
    assert best.file == file


def test_whole_seconds_of_gradients_count() -> None:
    """At 1 Gbit/s the gradients of 16 spans take 10 s, and one span of hpZ takes less."""
    many, one = job("zero2", gather_tokens=2048), job("zero3_nodes")
    assert waited_for(many, Links(80, 10)) == 1 and waited_for(job("zero2"), Links(80, 10)) == 0
    assert waited_for(many, Links(80, 1)) > waited_for(one, Links(80, 1))


def test_giving_hpz_up_costs_what_crosses_then() -> None:
    plain, second = Way("zero3", job("zero3")), Way("zero3_nodes", job("zero3_nodes"))
    assert plain.cost(second) == "30 GB more from other machines a step"
    assert second.cost(plain) == "nothing: no more is gathered"


ARTICLE = [str(ROOT / "examples/llama31_8b_7x4090.yaml"), "--num_nodes", "2", "--num_gpus", "7"]
ARTICLE += ["--model_name_or_path", str(ROOT / "examples/llama-3.1-8b")]


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*ARTICLE, *words]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_command_says_it_for_each_machine(capsys: pytest.CaptureFixture[str]) -> None:
    output = plan(capsys)
    assert output.startswith("2 x 7 x 24 GB, of which 23.64 GiB")
    assert re.search(r"^each host: processes, estimate +14\.00 GiB$", output, re.MULTILINE)
    assert "the host: " not in output and "at 80 and 10 Gbit/s" in output
    rows = {
        file: re.search(rf"^{file} +recomputed +step .*$", output, re.MULTILINE)
        for file in ("zero3", "zero3_nodes", "zero2")
    }
    moved = {file: row.group().split()[-6:] for file, row in rows.items() if row}
    assert moved == {
        "zero3": ["0.0", "GB", "0.0", "28.0", "GB", "22.4"],
        "zero3_nodes": ["25.7", "GB", "2.6", "0.2", "GB", "0.1"],
        "zero2": ["0.0", "GB", "0.0", "0.2", "GB", "0.1"],
    }
    (line,) = output.split("other machines in a step:\n")[1].splitlines()
    assert line.split("  ")[-1] == "deepspeed: zero2, gather_tokens: 16384"


def test_the_command_names_four_bits_where_less_is_waited_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = plan(capsys, "--gpu_memory", "16", "--node_gbps", "25")
    best, packed = output.split("recommended at 25 Gbit/s")[1].splitlines()[1:]
    assert "deepspeed: zero3_nodes" in best
    assert "quantization_bit: 4, deepspeed: zero2" in packed


def test_speeds_are_above_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARTICLE, "--node_gbps", "0", "--link_gbps", "-1"]) == 2
    error = capsys.readouterr().err
    assert "--node_gbps must be above 0" in error and "--link_gbps must be above 0" in error


def test_the_document_says_what_the_plan_says() -> None:
    """The table of several machines in docs/memory.md."""
    text = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    section = text.split("\n## Several machines\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if "| " in line][1:]
    assert len(rows) == 6
    for settings, *figures in rows:
        said = dict(re.findall(r"`(\w+)` (\d+)", settings))
        bits = 4 if "4 bits" in settings else None
        (file,) = re.findall(r"`(zero\w+)`", settings)
        start = article(quantization_bit=bits, zero=files(bits)[file], ranks=14, machines=2)
        way = replace(start, **{key: int(value) for key, value in said.items()})
        (within, between), taken = received(way), seconds(way, Links(80, 10))
        assert figures == [
            f"{peak_memory(way).total / GIB:.2f}",
            *(f"{number:.1f}" for number in (within / 1e9, taken[0], between / 1e9, taken[1])),
        ], settings
