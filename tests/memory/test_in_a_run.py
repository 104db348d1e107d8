"""What a run says of its memory beforehand and afterwards, and that its trial is the worst case."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minilora.data.documents import Documents
from minilora.data.schedule import Schedule
from minilora.data.steps import Place, TileLimits, build_step, most_tokens, worst_span
from minilora.files.model_config import shape_from_config
from minilora.memory.in_a_run import Forecast
from minilora.memory.peak import GIB, budget
from minilora.memory.ways import Way, advice, nearest_that_fit, recommended, ways
from minilora.memory.zero3_gathers import Zero
from minilora.plan import main as plan
from minilora.settings.errors import RequestError
from tests.support.article import ROOT, article
from tests.support.commands import fenced_commands, text_of
from tests.support.runs import Ground

NAMES = ("zero3", "zero2", "zero0", "zero3_offload")
FILES = {
    name: Zero.of(json.loads((ROOT / f"minilora/ds_configs/{name}.json").read_text()))
    for name in NAMES
}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_no_step_has_more_than_the_trial_computes(packing: bool, ranks: int) -> None:
    """Random rows, every step of two epochs, every rank: tokens, tiles, documents and labels."""
    source = np.random.Generator(np.random.PCG64(ranks))
    for _ in range(30):
        lengths = source.integers(2, source.integers(3, 120), source.integers(1, 90))
        trained = [np.arange(n) >= source.integers(0, n) for n in lengths]
        documents = Documents.of([(np.zeros(n, np.int32), t) for n, t in zip(lengths, trained)])  # noqa: B905
        tile = int(source.integers(1, 200))
        gather = None if source.integers(2) else tile + int(source.integers(0, 300))
        rows = int(source.integers(1, 12)) * ranks
        schedule = Schedule(
            documents.lengths,
            1,
            rows,
            120,
            packing,
            num_train_epochs=2,
            break_even_length=float(source.choice([np.inf, 120, 2])),  # longest: 120 tokens
        )
        limits = TileLimits(tile, gather)
        worst = worst_span(documents, most_tokens(schedule, ranks), limits)
        bounds = [len(worst.token_ids), max(map(sum, worst.tiles)), max(map(max, worst.tiles))]
        labels = int((worst.labels >= 0).sum())
        assert bounds[0] == sum(map(sum, worst.tiles)) == len(worst.labels)
        for step in range(schedule.total_steps):
            chosen = schedule.rows(step)
            for rank in range(ranks):
                place = Place(rank, ranks)
                made = build_step(documents, chosen, step, schedule, place, limits).spans
                for span in made:
                    found = [len(span.token_ids), max(map(sum, span.tiles)),
                             max(map(max, span.tiles))]  # fmt: skip
                    assert all(x <= y for x, y in zip(found, bounds, strict=True))
                    assert int((span.labels >= 0).sum()) <= labels


def test_the_trial_is_no_larger_than_equal_rows_make_it() -> None:
    """Sixteen rows of 50 tokens for each of 3 ranks: what a step has, it has."""
    documents = Documents.of([(np.zeros(50, np.int32), np.ones(50, np.bool_))] * 60)
    for packing in (False, True):
        schedule = Schedule(documents.lengths, 1, 48, 50, packing)
        most = most_tokens(schedule, 3)
        assert most == 800 if not packing else 800 <= most <= 850
        span = worst_span(documents, 800, TileLimits(120, 400))
        assert span.tiles == ((50, 50, 20), (50, 50, 20), (50, 50, 20), (40,))


def test_the_trial_has_what_a_step_can_have_and_no_more() -> None:
    """Four rows in a step of 3 ranks: one rank has two. Two long ones, as much work as the rest."""
    equal = Schedule(np.full(60, 30), 1, 3, 40, packing=True)
    assert most_tokens(equal, 3) == 60
    assert most_tokens(replace(equal, lengths=np.full(1, 30)), 3) == 30
    assert most_tokens(replace(equal, break_even_length=1.0), 3) == 120  # the step's room
    documents = Documents.of([(np.zeros(49, np.int32), np.arange(49) == 48)] * 9)
    span = worst_span(documents, 49, TileLimits())
    assert (span.labels >= 0).sum() == 1  # 49 * (1 / 49) is less than 1


def huge_checkpoint(folder: Path, tiny: Path) -> Path:
    """More weights than a machine has memory: a file of their size without contents."""
    folder.mkdir()
    for file in tiny.iterdir():
        if not file.name.endswith((".safetensors", ".index.json")):
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 100}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    header, at = {}, 0
    for name, shape in shape_from_config(config).parameter_shapes().items():
        end = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return folder


def test_a_run_that_does_not_fit_is_refused_before_weights_are_read(
    ground: Ground, tiny: Path, tmp_path: Path, launch: Callable[..., tuple[int, str]]
) -> None:
    job = ground.job("strict", "tiny", strict_plan=True, memory_snapshot=True)
    del job["adapter_name_or_path"]
    job["model_name_or_path"] = str(huge_checkpoint(tmp_path / "huge", tiny))
    job["output_dir"] = str(tmp_path / "out")
    words = ["-m", "minilora.train", *(f"--{key}={value}" for key, value in job.items())]
    code, output = launch(1, words, with_="python")
    assert code == 2 and "memory_snapshot: torch notes a GPU's memory" in output
    code, output = launch(1, [*words, "--memory_snapshot=false"], with_="python")
    assert code == 2
    assert "error: strict_plan: the plan needs " in output and "nearest settings" in output


def forecast(limit: float, on_gpu: bool = True) -> Forecast:
    setup = article(rank=16, on_gpu=on_gpu)
    return Forecast(Way("zero3", setup, budget(setup)), FILES, int(limit * GIB))


def test_the_opening_warns_or_refuses() -> None:
    (line,) = forecast(23.64).opening(strict=True)
    total = budget(article(rank=16)).total / GIB
    assert f"plan: {total:.4g} GiB per GPU" in line and "of 23.64: parameters" in line
    assert "up to 32,768 tokens" in line
    line, warning = forecast(10).opening(strict=False)
    assert warning.startswith("warning: the plan needs ")
    assert "that fit: offload_activations: true; or gather_tokens: 16384" in warning
    with pytest.raises(RequestError, match="strict_plan: the plan needs .*, 10 are free"):
        forecast(10).opening(strict=True)


def test_the_closing_compares_what_can_be_compared() -> None:
    read = [{"gpu_memory_allocated_gib": 12.5, "gpu_memory_reserved_gib": 13.0,
             "gpu_memory_used_gib": n} for n in (13.9, 14.1)]  # fmt: skip
    needs = budget(article(rank=16))
    line = forecast(23.64).closing(read)
    assert f"predicted {needs.tensors / GIB:.4g} GiB of tensors, measured 12.5 " in line
    assert f"predicted {needs.total / GIB:.4g}, in use 14.1 (reserved by torch 13)" in line
    line = forecast(23.64, on_gpu=False).closing([{"rss_gib": 0.4, "rss_peak_gib": 0.5}])
    assert "not measured" in line and "up to 0.5 GiB" in line


@pytest.mark.parametrize("phase", ["gather", "forward", "recompute", "loss", "step", "save"])
@pytest.mark.parametrize("keep", [0, 4, 32])
@pytest.mark.parametrize("file", NAMES)
def test_each_advice_saves_what_it_says(file: str, keep: int, phase: str) -> None:
    """Each change, planned again by itself."""
    setup = article(rank=16, zero=FILES[file], keep_blocks=keep)
    asked = Way(file, setup, budget(setup))
    lines = advice(asked, FILES, phase, int(23.64 * GIB))
    assert len(lines) == 3
    for line in lines:
        change, _, rest = line.partition(" saves ")
        new = dict(part.split(": ") for part in change.split(", "))
        assert (new.pop("disable_gradient_checkpointing", None) is not None) is (
            keep == 32 and "keep_blocks" in new
        )
        new = {key: FILES[value] if key == "deepspeed" else json.loads(value)
               for key, value in new.items()}  # fmt: skip
        if "deepspeed" in new:
            new["zero"] = new.pop("deepspeed")
        after, before = budget(replace(setup, **new)), asked.budget
        saved = before.phases[phase] - after.phases[phase]
        if "in other phases" in rest:
            assert saved == 0
            saved = before.total - after.total
        assert float(rest.split()[0]) == pytest.approx(saved / GIB, rel=0.01) and saved > 0
        more = (after.gathered - before.gathered) / 1e9
        assert (f"costs {more:.3g} GB more to gather" in rest) is (
            more > 0 and "PCIe" not in rest and "one more forward" not in rest
        )
        # 80 Gbit are 10 GB; the inputs of 32 blocks, in bf16, go out and come back.
        assert ("more to gather" not in rest) or f"{more / 10:.2g} s at 80 Gbit/s" in rest
        moved = 2 * 32 * 32768 * 4096 * 2 / 1e9
        assert ("beside the computation" not in rest) or f"{moved:.3g} GB a step over PCIe" in rest


@pytest.mark.parametrize("phase", ["recompute", "loss"])
@pytest.mark.parametrize("limit", [8, 23.64])
def test_advice_takes_the_mildest_value_that_saves_a_tenth(phase: str, limit: float) -> None:
    setup = article(rank=16, zero=FILES["zero3"])
    asked = Way("zero3", setup, budget(setup))
    goal = 0.9 * min(limit * GIB, asked.budget.phases[phase])
    lines = advice(asked, {}, phase, int(limit * GIB))
    found = [re.match(r"(gather|tile|loss)_tokens: (\d+) saves \S+ GiB, costs", x) for x in lines]
    for kind, value in (one.groups() for one in found if one):
        least = {"gather": setup.tile_tokens, "tile": 128, "loss": 64}[kind]
        there = [budget(replace(setup, **{f"{kind}_tokens": int(value) * n})).phases[phase]
                 for n in (1, 2)]  # fmt: skip
        assert there[0] <= goal < there[1] or (there[0] > goal and int(value) == least)
    assert any(found)


def test_shorter_documents_are_as_many() -> None:
    setup = article(rank=16, zero=FILES["zero3"], longest=16384, step_tokens=16 * 16384)
    offers = nearest_that_fit(Way("zero3", setup, budget(setup)), {"zero3": setup.zero}, 6 * GIB)
    assert offers and all(o.setup.longest < 16384 for o in offers)
    assert all(o.setup.step_tokens == 16 * o.setup.longest for o in offers)


@pytest.mark.parametrize("gib", [6, 8, 10, 12, 16, 24, 48, 80])
def test_what_is_recommended_fits_well_and_fetches_least(gib: int) -> None:
    setup, limit = article(rank=16, zero=FILES["zero3"]), gib * GIB
    found = ways(Way("zero3", setup, budget(setup)), {**FILES})
    chosen = recommended(found, limit)
    assert all((o.setup.gather_tokens or 10**6) >= o.setup.tile_tokens for o in found), (
        "else refused"
    )
    assert chosen and recommended(found, int(1.04 * chosen.budget.total)) is not chosen, (
        "5 % are spare"
    )
    for worth in (
        lambda o: -(o.budget.total <= 0.95 * limit),
        lambda o: o.setup.zero.offload_param,
        lambda o: o.budget.gathered,
        lambda o: -o.setup.keep_blocks,  # the least computed again
        lambda o: o.setup.offload_activations,  # the least moved
    ):
        least = min(map(worth, found))
        found = [option for option in found if worth(option) == least]
    assert chosen in found


def test_the_levers_need_what_the_plan_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/memory.md: rows that start with a setting, parts and totals, longest documents."""
    monkeypatch.chdir(ROOT)
    text = text_of(ROOT / "docs" / "memory.md")
    (command,) = [line for line in fenced_commands(text) if "minilora.plan" in line]

    def says(*changes: str) -> str:
        plan([*shlex.split(command)[3:], *changes])
        return capsys.readouterr().out

    def total(*changes: str) -> str:
        return re.findall(r"fullest.* (\S+) GiB", says(*changes))[0]

    levers = re.findall(r"^\| `(--[^`]+)` \| ([\d.]+) \|", text, re.MULTILINE)
    assert len(levers) == 12
    for change, told in [
        ("", re.findall(r"^\| as it is \| (\S+)", text, re.MULTILINE)[0]),
        *levers,
    ]:
        assert total(*change.split()) == told, change
    spans = ["--gather_tokens", "8192"]
    columns = [says(), says(*spans), says(*spans, "--deepspeed", "zero2")]
    for part in ("parameters", "activations", "optimizer states", "accumulation", "fixed"):
        (told,) = re.findall(rf"^\| {part}[^|]*\|(.*)\|[^|]*\|$", text, re.MULTILINE)
        found = [re.findall(rf"^{part} +(\S+) GiB", column, re.MULTILINE)[0] for column in columns]
        assert told.replace(" ", "").split("|") == found, part
    (told,) = re.findall(r"^\| \*\*total\*\* (.*)\| of", text, re.MULTILINE)
    assert re.findall(r"[\d.]+", told) == [total(*column) for column in (
        [], spans, [*spans, "--deepspeed", "zero2"])]  # fmt: skip
    for file, here, away in re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \|$", text, re.MULTILINE):
        assert re.search(rf"{file} +{here} +\({away}\)\n", columns[0]), file
    assert f"19.96 with `{' '.join(spans)}`" in text
    assert total(*spans, "--deepspeed", "zero0") == "19.96"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, CUDA_VISIBLE_DEVICES=0")
def test_the_history_of_a_gpu_is_written(ground: Ground, tmp_path: Path) -> None:
    """The real allocator, asked for more than there is."""
    from minilora.memory.in_a_run import OutOfMemory
    from minilora.settings.settings import TrainSettings

    train = TrainSettings(output_dir=str(tmp_path), memory_snapshot=True)
    with pytest.raises(OutOfMemory) as raised, forecast(23.64).explaining(0, train):
        torch.empty(2**45, dtype=torch.uint8, device="cuda")
    assert (tmp_path / "memory-0.pickle").stat().st_size > 0
    assert "memory-0.pickle" in raised.value.advice[-1]
