"""Only the run that wrote a snapshot resumes from it: other weights and data are named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from minilora.files.adapter import WEIGHTS
from minilora.files.model_card import CARD
from minilora.files.weights import INDEX, SINGLE
from minilora.merge import main as merge
from minilora.report.run_log import RESULTS
from tests.support.runs import Ground, adapter, base_weights, log, run_jobs, stage_file

CHANGED = "model.layers.1.mlp.up_proj.weight"
Jobs = dict[str, dict[str, Any]]


def one_file(ground: Ground, folder: Path, change: Callable[[torch.Tensor], None]) -> Path:
    """The base in one file and in another folder, with a change of one tensor."""
    shutil.copytree(ground.models["tiny"], folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = base_weights(ground.models["tiny"])
    change(weights[CHANGED])
    save_file(weights, folder / SINGLE, {"format": "pt"})
    return folder


def hub_cache(ground: Ground, folder: Path) -> Path:
    """The base as the hub's cache holds it: links to files that are named by their hashes."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "revision"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(ground.models["tiny"].iterdir())):
        shutil.copyfile(file, blobs / f"hash{number}")
        os.symlink(f"../../blobs/hash{number}", snapshot / file.name)
    assert (snapshot / INDEX).is_file()
    return snapshot


@pytest.fixture(scope="module")
def jobs(ground: Ground, launch: Callable[..., tuple[int, str]]) -> Jobs:
    """A run of three steps, and runs that would go on from its first or last snapshot."""
    place = ground.folder / "same-run"
    place.mkdir()
    rows = Path(shutil.copy(ground.data, place / "rows.jsonl"))
    common = {"max_steps": 3, "save_steps": 1, "dataset": str(rows),
              "deepspeed": str(stage_file(ground.folder, 3))}  # fmt: skip
    found: Jobs = {"whole": ground.job("same-run/whole", "tiny", **common)}
    whole = found["whole"]["output_dir"]

    def again(name: str, step: int = 1, **changes: Any) -> None:
        snapshot = f"{whole}/checkpoint-{step}"
        later = {**common, "resume_from_checkpoint": snapshot, "save_strategy": "no", **changes}
        found[name] = ground.job(f"same-run/{name}", "tiny", **later)

    def change_a_row(weight: torch.Tensor) -> None:
        weight[5] *= 1.5

    again("same weights, one file", model_name_or_path=str(
        one_file(ground, place / "one-file", lambda weight: None)))  # fmt: skip
    again("same weights, hub cache", model_name_or_path=str(hub_cache(ground, place / "hub")))
    again("row", refused=True, model_name_or_path=str(
        one_file(ground, place / "row-changed", change_a_row)))  # fmt: skip
    again("cutoff", refused=True, cutoff_len=48)
    again("decay", refused=True, weight_decay=0.3)
    again("nothing left", step=3, output_dir=whole, max_steps=2)
    again("killed before the end", step=3)
    run_jobs(launch, 2, [found["whole"]])
    before = (Path(whole) / RESULTS).read_bytes()

    merged = place / "merged"
    words = ["--model_name_or_path", str(ground.models["tiny"]), "--export_dir", str(merged)]
    assert merge([*words, "--adapter_name_or_path", whole]) == 0
    again("merged", refused=True, model_name_or_path=str(merged))
    other = rows.read_text(encoding="utf-8").replace("brief", "short")
    again("rows", refused=True)
    found["whole"]["output"] = run_jobs(launch, 2, [*found.values()][1:-1])
    rows.write_text(other, encoding="utf-8")
    run_jobs(launch, 2, [found["rows"]])
    found["whole"]["results before"] = before
    return found


def problems(jobs: Jobs, name: str) -> list[str]:
    path = Path(jobs[name]["output_dir"]) / "refused.json"
    lines: list[str] = json.loads(path.read_text(encoding="utf-8"))
    assert lines[-1].startswith("undo these changes, or begin a new run with the adapter of that")
    assert f"adapter_name_or_path: {jobs[name]['resume_from_checkpoint']}," in lines[-1]
    return lines[:-1]


@pytest.mark.parametrize("how", ["one file", "hub cache"])
def test_the_same_weights_resume_to_the_same_bits_from_other_files(jobs: Jobs, how: str) -> None:
    rest = jobs[f"same weights, {how}"]
    for key in ("current_steps", "loss", "grad_norm"):
        assert log(rest, key) == log(jobs["whole"], key)[1:], key
    expected = adapter(jobs["whole"])
    for name, tensor in adapter(rest).items():
        assert torch.equal(tensor, expected[name]), name


def test_one_changed_row_of_one_matrix_is_named(jobs: Jobs) -> None:
    (problem,) = problems(jobs, "row")
    assert f"was made with other base weights: {CHANGED} differs (model_name_or_path was" in problem
    assert problem.endswith("row-changed)")


def test_the_merged_model_is_no_base_to_go_on_with(jobs: Jobs) -> None:
    """Its norms and embeddings are the base's; the adapter would be applied a second time."""
    (problem,) = problems(jobs, "merged")
    first = "model.layers.0.self_attn.q_proj.weight"
    assert f"other base weights: {first} and 13 more differ" in problem


def test_other_data_are_told_by_setting_and_by_file(jobs: Jobs) -> None:
    (problem,) = problems(jobs, "cutoff")
    assert problem.endswith("was made with other data: cutoff_len was 96, is 48")
    (problem,) = problems(jobs, "rows")
    assert problem.endswith(
        f"was made with other data: {jobs['rows']['dataset']} has changed since"
    )
    (problem,) = problems(jobs, "decay")
    assert problem.endswith("was made with weight_decay = 0.1, this run has 0.3")


def test_a_run_with_nothing_left_says_so_and_leaves_the_results(jobs: Jobs) -> None:
    output = Path(jobs["whole"]["output_dir"])
    words = f"nothing is left to train: {output}/checkpoint-3 was written after step 3, and the run"
    assert f"{words} has 2; raise num_train_epochs or max_steps" in jobs["whole"]["output"]
    assert "step 3 of 2" not in jobs["whole"]["output"]
    assert (output / RESULTS).read_bytes() == jobs["whole"]["results before"]
    assert log(jobs["whole"], "current_steps") == [1, 2, 3]


def test_a_run_that_was_killed_before_its_end_gets_its_adapter(jobs: Jobs) -> None:
    """Its last snapshot is there; the adapter and the results are not."""
    output = Path(jobs["killed before the end"]["output_dir"])
    assert json.loads((output / RESULTS).read_text())["total_tokens"] > 0
    expected = (Path(jobs["whole"]["output_dir"]) / WEIGHTS).read_bytes()
    assert (output / WEIGHTS).read_bytes() == expected


def test_a_run_leaves_a_model_card_that_the_hub_reads(jobs: Jobs) -> None:
    output = Path(jobs["killed before the end"]["output_dir"])
    card = ModelCard.load(output / CARD)
    base = Path(jobs["whole"]["model_name_or_path"]).name
    assert (card.data.base_model, card.data.library_name) == (base, "peft")
    loss = json.loads((output / RESULTS).read_text(encoding="utf-8"))["train_loss"]
    for line in ("- rows.jsonl", "| weight_decay | 0.1 |", f"| train_loss | {loss} |"):
        assert f"\n{line}\n" in card.text, card.text
