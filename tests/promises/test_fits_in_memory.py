"""The memory plan: held against what torch's allocator counts, and as a command."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from minilora.plan import main
from tests.support.article import ROOT
from tests.support.commands import fenced_commands, text_of
from tests.support.plan_cases import BASE, CASES

ARTICLE = [str(ROOT / "examples/llama31_8b_7x4090.yaml"), "--num_gpus", "7"]
ARTICLE += ["--model_name_or_path", str(ROOT / "examples/llama-3.1-8b")]
Row = dict[str, Any]


def count(
    launch: Callable[..., tuple[int, str]], ranks: int, cases: list[Row], real: bool = False
) -> list[Row]:
    """Run the real engine for two steps per case; JSON lines as rows."""
    words = ["-m", "benchmarks.memory", "--device", "cpu", "--size", "mid", "--ranks", str(ranks)]
    words += ["--cases", json.dumps([{**BASE, **case} for case in cases])]
    with_ = "forked" if real else "alone"
    code, output = launch(ranks if real else 1, words, with_=with_)
    assert code == 0, output
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(rows) == len(cases), output
    return rows


@pytest.fixture(scope="session")
def counted(launch: Callable[..., tuple[int, str]]) -> dict[int, list[Row]]:
    """By number of ranks: what was predicted and counted on rank 0 of so many, side by side."""
    with ThreadPoolExecutor() as pool:
        rows = pool.map(lambda ranks: count(launch, ranks, CASES[ranks]), CASES)
        return dict(zip(CASES, rows, strict=True))


@pytest.mark.parametrize(
    ("ranks", "index"), [(ranks, index) for ranks in CASES for index in range(len(CASES[ranks]))]
)
def test_the_plan_counts_what_the_allocator_counts(
    counted: dict[int, list[Row]], ranks: int, index: int
) -> None:
    row, case = counted[ranks][index], CASES[ranks][index]
    predicted, measured = row["predicted"], row["measured"]
    assert predicted["run"] == pytest.approx(measured["run"], rel=0.02), row
    # In bf16 the CPU's products take scratch memory, which the plan does not count.
    moments = ["loss"] if "bf16" in case else ["forward", "loss", "recompute"]
    for moment in moments:
        assert predicted[moment] == pytest.approx(measured[moment], rel=0.02), (moment, row)
    assert 0.99 * measured["step"] < predicted["step"] < 1.1 * measured["step"], row
    for kept in ("weights", "LoRA", "Adam moments"):
        assert predicted[kept] == pytest.approx(measured[kept], rel=0.005), (kept, row)
    if "packing" not in case:  # how many spans packed rows make depends on the rows
        assert predicted["gathered"] == measured["gathered"], row


def test_the_cases_differ_in_what_fills_them(counted: dict[int, list[Row]]) -> None:
    """Otherwise a term that is never the largest would be tested nowhere."""
    rows = [row["measured"] for rows in counted.values() for row in rows]
    peaks = {max(("forward", "loss", "recompute"), key=row.__getitem__) for row in rows}
    assert peaks >= {"loss", "recompute"}
    runs = [row["run"] for row in rows]
    assert max(runs) > 4 * min(runs)


def test_real_ranks_hold_what_the_made_up_one_holds(
    counted: dict[int, list[Row]], launch: Callable[..., tuple[int, str]]
) -> None:
    """Peaks are not compared: gloo's own buffers are released in threads that are not counted."""
    cases = CASES[2][:2] + CASES[2][3:4]
    real = count(launch, 2, cases, real=True)
    for row, made_up in zip(real, counted[2][:2] + counted[2][3:4], strict=True):
        assert row["case"] == made_up["case"]
        for kept in ("weights", "LoRA", "Adam moments", "gathered"):
            assert row["measured"][kept] == made_up["measured"][kept], kept


Plan = Callable[..., tuple[int, str]]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Plan:
    """Run the command: its exit code and what it printed."""

    def run(*words: str) -> tuple[int, str]:
        try:
            code = main(words)
        except SystemExit as leaving:
            code = int(str(leaving.code))
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_the_articles_job_fits_seven_cards_and_not_small_ones(plan: Plan) -> None:
    code, output = plan(*ARTICLE, "--gpu_memory", "24")
    assert code == 0
    assert (
        "23.64 GiB can be used" in output and "fits: +" in output and output.count("*") == 2
    )  # the legend and the recommendation
    (recommended,) = [line for line in output.splitlines() if re.search(r"\d\*", line)]
    assert recommended.startswith("zero2") and "0.0 GB" in recommended
    code, output = plan(*ARTICLE, "--gpu_memory", "6")
    assert code == 1
    assert "does not fit: -" in output


def test_the_plan_goes_by_the_files_and_types_that_are_asked_for(
    plan: Plan, tmp_path: Path
) -> None:
    own = tmp_path / "own.json"
    own.write_text((ROOT / "minilora/ds_configs/zero3.json").read_text())
    _, output = plan(*ARTICLE, "--deepspeed", str(own), "--bf16", "false")
    assert "deepspeed: own\n" in output and re.search(r"^own +recomputed", output, re.MULTILINE)
    assert re.search(r"weights, shard +4\.27\n", output), "8.03e9 x 4 B / 7"


def test_gathers_take_the_time_that_the_link_takes(plan: Plan) -> None:
    """30.02 GB, of which 6 of 7 parts come from others, are 206 Gbit."""
    for link, seconds in (("80", "2.6"), ("20", "10.3")):
        _, output = plan(*ARTICLE, "--link_gbps", link)
        (row,) = re.findall(r"^zero3 +recomputed +step .*$", output, re.MULTILINE)
        assert row.split()[-3:] == ["30.0", "GB", seconds]


@pytest.mark.parametrize("memory", ["5", "6", "12"])
def test_nearest_settings_really_fit(plan: Plan, memory: str) -> None:
    words = [*ARTICLE, "--per_device_train_batch_size", "16", "--gpu_memory", memory]
    code, output = plan(*words)
    assert code == 1
    offers = (
        output.split("nearest settings that fit:\n")[1].partition("with frozen")[0].splitlines()
    )
    assert offers
    for offer in offers:
        changes = [f"--{change.replace(': ', '=')}" for change in offer.split("  ")[-1].split(", ")]
        code, again = plan(*words, *changes)
        assert code == 0, (changes, again)
        assert f"{offer.split()[0]} GiB" in again


def test_nothing_fits_on_too_small_a_card(plan: Plan) -> None:
    code, output = plan(*ARTICLE, "--gpu_memory", "2")
    assert code == 1
    assert "nothing fits" in output


def test_no_torch_no_gpu_no_weights() -> None:
    """So that it takes a second, where importing torch alone takes several."""
    check = "import sys; from minilora.plan import main; main(sys.argv[1:]); "
    check += "assert not {'torch', 'deepspeed', 'numpy'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", check, *ARTICLE], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--num_gpus", "0"], "--num_gpus must be above 0"),
        (["--gpu_memory", "-1"], "--gpu_memory must be above 0"),
        (["--num_gpus", "many"], "--num_gpus"),
        (["--model_name_or_path", "nowhere"], "model_name_or_path: nowhere: no such folder"),
        (["--deepspeed", "zero9"], "zero9: no such file"),
        (["--lora_target", "q_prj"], "no layer is called q_prj"),
        (["--gpu_memry", "24"], "not a known key"),
        (["--keep_blocks", "40"], "the model has 32 blocks"),
        (["--keep_blocks", "4", "--disable_gradient_checkpointing", "true"], "remove keep_blocks"),
        (["--gather_tokens", "100"], "less than tile_tokens"),
    ],
)
def test_wrong_requests(plan: Plan, words: list[str], named: str) -> None:
    code, output = plan(*ARTICLE, *words)
    assert code == 2
    assert named in output


@pytest.mark.parametrize(
    "words", [[], ["--deepspeed", "zero0"], ["--disable_gradient_checkpointing", "true"]], ids=str
)
def test_formulas_come_to_their_numbers(plan: Plan, words: list[str]) -> None:
    _, output = plan(*ARTICLE, *words, "--explain")
    lines = re.split(r"\n(?:fits|does not fit): ", output)[0].splitlines()
    formulas = [line for line in lines if " = " in line]
    assert len(formulas) > 10
    for line in formulas:
        shown, formula = line.split(" = ")
        numbers = re.sub(r"\(.*\)|[a-zA-Z,]", "", formula.replace(" x ", " * "))
        told = float(shown.removesuffix(" GiB ").split()[-1])
        assert told == pytest.approx(eval(numbers) / 2**30, abs=0.006), line


def test_tensors_come_to_their_terms(plan: Plan) -> None:
    """Tensors are indented below their term, terms below their part."""
    _, output = plan(*ARTICLE, "--keep_blocks", "2", "--gather_tokens", "8192", "--explain")
    table = output.split("peak of a GPU: ")[0].splitlines()[2:]
    sums: dict[int, float] = {}
    for line in reversed(table):
        level = (len(line) - len(line.lstrip())) // 2
        shown = float(line.partition(" = ")[0].removesuffix(" GiB").split()[-1])
        if level + 1 in sums:
            assert shown == pytest.approx(sums.pop(level + 1), abs=0.1), line
        sums[level] = sums.get(level, 0.0) + shown
    (told,) = re.findall(r"peak of a GPU: .* (\S+) GiB", output)
    assert float(told) == pytest.approx(sums[0], abs=0.02)


def test_the_document_of_the_levers_says_what_the_plan_says(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/memory.md: rows that start with a setting, parts and totals, longest documents."""
    monkeypatch.chdir(ROOT)
    text = text_of(ROOT / "docs" / "memory.md")
    (command, _) = [line for line in fenced_commands(text) if "minilora.plan" in line]

    def says(*changes: str) -> str:
        return plan(*shlex.split(command)[3:], *changes)[1]

    def total(*changes: str) -> str:
        return re.findall(r"peak of a GPU: .* (\S+) GiB", says(*changes))[0]

    (as_it_is,) = re.findall(r"^\| as it is \| (\S+)", text, re.MULTILINE)
    assert total() == as_it_is
    levers = re.findall(r"^\| `(--[^`]+)` \| ([\d.]+) \|", text, re.MULTILINE)
    assert len(levers) == 12
    for change, told in levers:
        assert total(*change.split()) == told, change

    spans = ["--gather_tokens", "8192"]
    columns = [says(), says(*spans), says(*spans, "--deepspeed", "zero2")]
    for part in ("parameters", "activations", "optimizer states", "accumulation", "fixed"):
        (told,) = re.findall(rf"^\| {part}[^|]*\|(.*)\|[^|]*\|$", text, re.MULTILINE)
        found = [re.findall(rf"^{part} +(\S+) GiB", column, re.MULTILINE)[0] for column in columns]
        assert told.replace(" ", "").split("|") == found, part
    (told,) = re.findall(r"^\| \*\*total\*\* (.*)\| of", text, re.MULTILINE)
    assert re.findall(r"[\d.]+", told) == [
        total(), total(*spans), total(*spans, "--deepspeed", "zero2")
    ]  # fmt: skip
    documents = re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \|$", text, re.MULTILINE)
    assert len(documents) == 4
    for file, here, away in documents:
        assert re.search(rf"{file} +{here} +\({away}\)\n", columns[0]), file
    assert f"19.86 with `{' '.join(spans)}`" in text
    assert total(*spans, "--deepspeed", "zero0") == "19.86"


def test_the_plot(plan: Plan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    assert plan(*ARTICLE, "--plot", str(picture))[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
