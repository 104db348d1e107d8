"""What a run says of its memory beforehand and afterwards, and that its trial is the worst case."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed

from benchmarks.meters import Pretended
from minilora.data.documents import Documents
from minilora.data.schedule import Schedule
from minilora.data.steps import Place, TileLimits, build_step, most_tokens, worst_span
from minilora.files.model_config import shape_from_config
from minilora.memory.in_a_run import Forecast, OutOfMemory, foresee
from minilora.memory.peak import GIB, peak_memory
from minilora.memory.spare import Open
from minilora.memory.ways import Way
from minilora.model.lora_shape import LoraShape
from minilora.model.loss import head_loss
from minilora.processes.world import World
from minilora.settings.errors import RequestError
from minilora.settings.settings import TrainSettings
from tests.support.article import FILES, ROOT, article
from tests.support.commands import fences, text_of
from tests.support.runs import Ground


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
            chosen = schedule.document_ids(step)
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


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_refused_before_weights_are_read(
    ground: Ground, tiny: Path, tmp_path: Path, launch: Callable[..., tuple[int, str]]
) -> None:
    job = ground.job("strict", "tiny", strict_plan=True, memory_snapshot=True)
    del job["adapter_name_or_path"]
    job["model_name_or_path"] = str(huge_checkpoint(tmp_path / "huge", tiny))
    job["output_dir"] = str(tmp_path / "out")
    words = ["-m", "minilora.train", *(f"--{key}={value}" for key, value in job.items())]
    code, output = launch(1, words, with_="alone")
    assert code == 2 and "memory_snapshot: torch notes a GPU's memory" in output
    code, output = launch(1, [*words, "--memory_snapshot=false"], with_="alone")
    assert code == 2
    assert "error: strict_plan: the plan needs " in output and "nearest settings" in output


SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 500,
}


def forecast(limit: float, on_gpu: bool = True) -> Forecast:
    asked = Way("zero3", article())
    decided = Way("zero3", article(on_gpu=on_gpu))
    return Forecast(asked, decided, FILES, int(limit * GIB))


def test_the_opening_warns_or_refuses() -> None:
    (line,) = forecast(23.64).opening(strict=True)
    total = peak_memory(article()).total / GIB
    assert f"plan: peak of a GPU {total:.4g} GiB (loss, head), of 23.64: parameters" in line
    assert "up to 32,768 tokens" in line
    line, warning = forecast(10).opening(strict=False)
    assert warning.startswith("warning: the plan needs ")
    assert "that fit: offload_activations: true; or gather_tokens: 16384" in warning
    with pytest.raises(RequestError, match="strict_plan: the plan needs .*, 10 are free"):
        forecast(10).opening(strict=True)


def test_the_closing_compares_what_can_be_compared() -> None:
    read = [
        {
            "gpu_memory_allocated_gib": 12.5,
            "gpu_memory_reserved_gib": 13.0,
            "gpu_memory_used_gib": n,
        }
        for n in (13.9, 14.1)
    ]
    peak = peak_memory(article())
    line = forecast(23.64).closing(read)
    assert f"predicted {peak.tensors / GIB:.4g} GiB of tensors, measured 12.5 " in line
    assert f"predicted {peak.total / GIB:.4g}, in use 14.1 (reserved by torch 13)" in line
    line = forecast(23.64, on_gpu=False).closing([{"rss_gib": 0.4, "rss_peak_gib": 0.5}])
    assert "not measured" in line and "up to 0.5 GiB" in line


def test_running_out_in_the_loss_is_explained_as_the_document_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """docs/memory.md, When memory runs out all the same."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...\nmore of torch")

    monkeypatch.setattr(torch.Tensor, "scatter_add_", full)
    hidden, targets = torch.zeros(1, 4, requires_grad=True), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(OutOfMemory) as raised, forecast(11.2).explaining(3, TrainSettings()):
        head_loss(hidden, torch.zeros(3, 4), targets, 1.0)
    told = "\n".join([f"error: {raised.value}", *raised.value.advice, ""])
    assert ("text", told) in fences(text_of(ROOT / "docs" / "memory.md")), told


def test_other_errors_are_not_explained() -> None:
    with pytest.raises(ValueError, match="another"), forecast(11.2).explaining(3, TrainSettings()):
        raise ValueError("another error")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A world of one rank, in this process."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "set anew, and put back in the end")
    yield Pretended(1, "cpu")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("saves_what_fits", [False, True])
def test_what_is_asked_and_what_is_decided_are_two_things(
    alone: World, saves_what_fits: bool
) -> None:
    """Rows are half as long as they may be, another adapter goes on, and all blocks may save."""
    shape = shape_from_config(SMALL)
    job = article(ranks=1, shape=shape, step_tokens=4096, adapter=pairs_on("q_proj"))
    schedule = Schedule(np.full(60, 1024), 1, 2, 2048, packing=False)
    asked = Way("zero3", job)
    left_open = Open(blocks=saves_what_fits)
    found = foresee(alone, asked, FILES, pairs_on("v_proj"), schedule, left_open)
    assert found.asked is asked and found.files is FILES
    decided = found.decided.job
    assert (decided.step_tokens, decided.longest, decided.on_gpu) == (2048, 1024, False)
    assert decided.adapter == pairs_on("v_proj")
    assert decided.keep_blocks == (2 if saves_what_fits else 0)
    assert 0 < found.limit < 2**50


def pairs_on(layer: str) -> LoraShape:
    return LoraShape(8, 8.0, 0.0, (layer,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, CUDA_VISIBLE_DEVICES=0")
def test_the_history_of_a_gpu_is_written(tmp_path: Path) -> None:
    """The real allocator, asked for more than there is."""
    train = TrainSettings(output_dir=str(tmp_path), memory_snapshot=True)
    with pytest.raises(OutOfMemory) as raised, forecast(23.64).explaining(0, train):
        torch.empty(2**45, dtype=torch.uint8, device="cuda")
    assert (tmp_path / "memory-0.pickle").stat().st_size > 0
    assert "memory-0.pickle" in raised.value.advice[-1]
