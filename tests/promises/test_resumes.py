"""Nothing is lost: a run that was interrupted anywhere ends as if it had not been."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from minilora.files.snapshot import DRAFT, STATE, TENSORS
from tests.support.processes import Launch
from tests.support.runs import Ground, adapter, log, run_jobs, stage_file

STEPS = 9
ROWS = 12  # of 75, so that an epoch ends after the 7th step
Jobs = dict[Any, dict[str, Any]]


def job(ground: Ground, name: str, stage: int, **changes: Any) -> dict[str, Any]:
    settings = {"max_steps": STEPS, "save_steps": 1, "per_device_train_batch_size": ROWS,
                "deepspeed": str(stage_file(ground.folder, stage)), **changes}  # fmt: skip
    return ground.job(name, "tiny", **settings)


@pytest.fixture(scope="session")
def resumed(ground: Ground, launch: Launch) -> Jobs:
    """A run of 9 steps with a snapshot at each, and one that goes on from each of them."""
    jobs: Jobs = {}
    common = {"lora_dropout": 0.3, "per_device_train_batch_size": ROWS // 2}
    jobs["whole"] = job(ground, "whole", 3, **common)
    jobs["in place"] = {**job(ground, "in-place", 3, **common), "max_steps": 2}
    jobs["in place, on"] = {
        **job(ground, "in-place", 3, **common),
        "max_steps": 4,
        "resume_from_checkpoint": "true",
    }
    del jobs["in place, on"]["overwrite_output_dir"]
    for step in range(1, STEPS):
        jobs[step] = {
            **job(ground, f"from-{step}", 3, **common),
            "save_strategy": "no",
            "resume_from_checkpoint": f"{jobs['whole']['output_dir']}/checkpoint-{step}",
        }
    family = {**common, "adapter_name_or_path": str(ground.adapters["whole"]), "max_steps": 4,
              "loraplus_lr_ratio": 4, "save_steps": 2}  # fmt: skip
    dora = {**family, "adapter_name_or_path": "null", "use_dora": True,
            "additional_target": "lm_head"}  # fmt: skip
    for name, settings in (("continued", family), ("new", dora)):
        jobs[name] = {**job(ground, name, 3, **settings)}
        snapshot = f"{jobs[name]['output_dir']}/checkpoint-2"
        jobs[f"{name}, on"] = {**job(ground, f"{name}-on", 3, **settings), "save_strategy": "no",
                               "resume_from_checkpoint": snapshot}  # fmt: skip
    jobs["four bits"] = packed_job(ground, "four-bits", 3, per_device_train_batch_size=ROWS // 2)
    run_jobs(launch, 2, list(jobs.values()))
    return jobs


def packed_job(ground: Ground, name: str, stage: int, **changes: Any) -> dict[str, Any]:
    """Four steps over weights in 4 bits."""
    settings = {"max_steps": 4, "save_steps": 1, "per_device_train_batch_size": ROWS,
                "deepspeed": str(stage_file(ground.folder, stage)), "quantization_bit": 4,
                **changes}  # fmt: skip
    return ground.job(name, "packable", **settings)


@pytest.mark.parametrize("name", ["continued", "new"])
def test_whole_layers_and_dora_go_on_to_the_bit(resumed: Jobs, name: str) -> None:
    whole, rest = resumed[name], resumed[f"{name}, on"]
    for key in ("current_steps", "loss", "grad_norm"):
        assert log(rest, key) == log(whole, key)[2:], key
    expected = adapter(whole)
    assert "base_model.model.lm_head.weight" in expected
    for parameter, tensor in adapter(rest).items():
        assert torch.equal(tensor, expected[parameter]), parameter


@pytest.mark.parametrize("step", range(1, STEPS))
def test_going_on_from_any_step_changes_no_bit(resumed: Jobs, step: int) -> None:
    whole, rest = resumed["whole"], resumed[step]
    for key in ("current_steps", "loss", "grad_norm", "lr", "epoch", "total_tokens"):
        assert log(rest, key) == log(whole, key)[step:], key
    expected = adapter(whole)
    for name, tensor in adapter(rest).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_run_goes_on_in_its_own_folder_without_leave_to_overwrite(resumed: Jobs) -> None:
    assert log(resumed["in place, on"], "current_steps") == [1, 2, 3, 4]


def test_snapshots_are_adapters_and_small(resumed: Jobs) -> None:
    folder = Path(resumed["whole"]["output_dir"])
    kept = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert [path.name for path in kept] == [f"checkpoint-{step}" for step in range(1, STEPS + 1)]
    last = {**resumed["whole"], "output_dir": str(kept[-1])}
    for name, tensor in adapter(resumed["whole"]).items():
        assert torch.equal(adapter(last)[name], tensor)
    lora_bytes = sum(tensor.nbytes for tensor in adapter(last).values())
    assert (kept[-1] / TENSORS).stat().st_size < 3.5 * lora_bytes + 20_000


@pytest.fixture(scope="session")
def travelled(ground: Ground, launch: Launch, resumed: Jobs) -> Jobs:
    """9 steps on 1 rank without ZeRO, and the same over 3, 2, 1 and again 3 ranks.

    Over weights in 4 bits: from a snapshot of 2 ranks with ZeRO-3 on 1 rank without.
    """
    jobs: Jobs = {"whole": job(ground, "stay", 0, save_strategy="no")}
    legs = [(3, 3, 3), (2, 2, 3), (1, 0, 2), (3, 3, 1)]  # ranks, stage, steps
    for number, (ranks, stage, steps) in enumerate(legs):
        settings = {"per_device_train_batch_size": ROWS // ranks, "resume_from_checkpoint": "true"}
        jobs[number] = job(ground, "travel", stage, **settings)
        if number < len(legs) - 1:
            jobs[number]["stop_after"] = steps
    jobs["four bits, on"] = packed_job(
        ground,
        "four-bits-on",
        0,
        save_strategy="no",
        resume_from_checkpoint=f"{resumed['four bits']['output_dir']}/checkpoint-2",
    )
    jobs["four bits, whole"] = packed_job(ground, "four-bits-whole", 0, save_strategy="no")
    run_jobs(launch, 1, [jobs["whole"], jobs["four bits, on"], jobs["four bits, whole"]])
    for number, (ranks, _, _) in enumerate(legs):
        run_jobs(launch, ranks, [jobs[number]])
    return jobs


def test_ranks_and_stages_may_change_on_the_way(travelled: Jobs) -> None:
    whole, travel = travelled["whole"], travelled[3]
    assert log(travel, "current_steps") == list(range(1, STEPS + 1))
    assert log(travel, "loss") == pytest.approx(log(whole, "loss"), rel=1e-5)
    assert log(travel, "grad_norm") == pytest.approx(log(whole, "grad_norm"), rel=1e-4)


def test_a_run_over_four_bits_moves_from_two_ranks_to_one(resumed: Jobs, travelled: Jobs) -> None:
    two, one = resumed["four bits"], travelled["four bits, on"]
    assert log(one, "loss") == pytest.approx(log(two, "loss")[2:], rel=1e-5)
    assert log(one, "grad_norm") == pytest.approx(log(two, "grad_norm")[2:], rel=1e-4)
    for name, tensor in adapter(two).items():
        torch.testing.assert_close(adapter(one)[name], tensor, rtol=1e-4, atol=1e-6)


def test_kill_9_of_a_run_over_four_bits_loses_nothing(
    ground: Ground, travelled: Jobs, launch: Launch
) -> None:
    killed = packed_job(ground, "four-bits-killed", 0, resume_from_checkpoint="true")
    lines = run_and_kill(launch, ground, killed, 2)
    assert [line["code"] for line in lines] == [-signal.SIGKILL] * 2 + [0]
    whole = travelled["four bits, whole"]
    assert log(killed, "loss") == log(whole, "loss")
    for name, tensor in adapter(whole).items():
        assert torch.equal(adapter(killed)[name], tensor), name


def run_and_kill(
    launch: Launch, ground: Ground, settings: dict[str, Any], kills: int
) -> list[dict[str, Any]]:
    """Kill a run so many times, each time at another moment; returns a line for each attempt."""
    listed = ground.folder / f"kills-{Path(settings['output_dir']).name}.json"
    listed.write_text(json.dumps(settings), encoding="utf-8")
    words = ["-m", "tests.support.kills", listed, str(kills), "5"]
    code, output = launch(1, words, with_="alone")
    assert code == 0, output
    return [json.loads(line) for line in re.findall(r'{"code": .*}', output)]


def test_kill_9_at_any_moment_loses_nothing(ground: Ground, launch: Launch) -> None:
    """MINILORA_KILLS says how many; the documentation's figure is from 20."""
    kills = int(os.environ.get("MINILORA_KILLS", "6"))
    steps = 2 * kills
    settings = job(ground, "killed", 0, lora_dropout=0.3, save_total_limit=2, max_steps=steps)
    settings["resume_from_checkpoint"] = "true"
    whole = {**settings, "output_dir": str(ground.folder / "not-killed")}
    lines = {}
    for name, run, count in (("whole", whole, 0), ("killed", settings, kills)):
        lines[name] = run_and_kill(launch, ground, run, count)
    assert [line["code"] for line in lines["whole"]] == [0]
    codes = [line["code"] for line in lines["killed"]]
    assert codes == [-signal.SIGKILL] * kills + [0]
    saving = [line for line in lines["killed"] if any(DRAFT in name for name in line["kept"])]
    assert saving, "no kill fell into a save"
    assert log(settings, "loss") == log(whole, "loss")
    assert log(settings, "total_tokens") == log(whole, "total_tokens")
    expected = adapter(whole)
    for name, tensor in adapter(settings).items():
        assert torch.equal(tensor, expected[name]), name
    last = [f"checkpoint-{step}" for step in (steps - 1, steps)]
    assert sorted(lines["killed"][-1]["kept"]) == sorted(last)


def refused(launch: Launch, settings: dict[str, Any]) -> str:
    words = [f"--{key}={value}" for key, value in settings.items()]
    code, output = launch(1, ["-m", "minilora.train", *words], with_="alone")
    assert code == 2 and "Traceback" not in output, output
    return output


def test_what_changes_the_maths_is_refused_by_name(
    resumed: Jobs, ground: Ground, launch: Launch
) -> None:
    """All differences at once: data, adapter, packing, and every setting of the optimizer."""
    (ground.folder / "other.jsonl").write_text(
        ground.data.read_text(encoding="utf-8").replace("brief", "short"), encoding="utf-8"
    )
    numbers = {
        "learning_rate": 1e-3, "warmup_ratio": 0.1, "warmup_steps": 1, "weight_decay": 0.2,
        "loraplus_lr_ratio": 2.0, "max_grad_norm": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9,
        "adam_epsilon": 1e-6, "seed": 1,
    }  # fmt: skip
    others = {"lr_scheduler_type": "linear", "disable_shuffling": True, "packing": True}
    changed = {
        **resumed[5],
        **numbers,
        **others,
        "dataset": str(ground.folder / "other.jsonl"),
        "lora_dropout": 0.1,
        "per_device_train_batch_size": ROWS,
        "output_dir": str(ground.folder / "refused"),
    }
    output = refused(launch, changed)
    assert "learning_rate = 0.0002, this run has 0.001" in output
    for key in (*numbers, *others):
        assert f"made with {key} = " in output, key
    assert "made with other data: dataset was" in output
    assert "made with lora dropout = 0.3, this run has 0.1" in output
    assert f"adapter_name_or_path: {changed['resume_from_checkpoint']}, without resume" in output


def test_a_draft_or_a_broken_snapshot_is_not_gone_on_from(
    resumed: Jobs, ground: Ground, launch: Launch
) -> None:
    source = Path(resumed["whole"]["output_dir"])
    broken = ground.folder / "broken"
    shutil.copytree(source / "checkpoint-3", broken / "checkpoint-3")
    shutil.copytree(source / "checkpoint-5", broken / f"checkpoint-5{DRAFT}")
    (broken / "checkpoint-3" / TENSORS).write_bytes(b"cut")
    settings = {**resumed[3], "output_dir": str(broken), "resume_from_checkpoint": "true",
                "per_device_train_batch_size": ROWS}  # fmt: skip
    assert f"checkpoint-3/{TENSORS}: cannot be read" in refused(launch, settings)
    nowhere = {**settings, "resume_from_checkpoint": str(broken / "checkpoint-9")}
    assert f"holds no {STATE}" in refused(launch, nowhere)
