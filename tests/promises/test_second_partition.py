"""hpZ: weights that are split within each machine too change no bit, and stay off the network.

Two machines of two ranks each are four forks that learn it from their environment.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minilora.files.deepspeed_file import Facts, resolve_ds_config
from minilora.files.model_config import read_model_config
from minilora.memory.job import memory_job
from minilora.memory.traffic import Traffic, traffic
from minilora.memory.zero3_gathers import Zero
from minilora.settings.command_line import read_settings
from minilora.settings.errors import RequestError
from minilora.training.deepspeed_internals import group_ranks
from tests.support.runs import Ground, adapter, costs, log, run_jobs, stage_file, variant_shape

Jobs = dict[str, dict[str, Any]]

MACHINES, RANKS = 2, 2
# What changes in a pair of jobs, one with the second partition and one without.
PAIRS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    # A trained head is gathered as the weights are, and its second partition is stale after a step.
    "DoRA": {"bf16": True, "use_dora": True, "additional_target": "lm_head,embed_tokens",
             "adapter_name_or_path": "null", "max_steps": 3},
    "four bits": {"quantization_bit": 4},
}  # fmt: skip
SIZES: dict[str, Any] = {"LoRA": 2, "DoRA": "auto", "four bits": 2}


def with_second_partition(ground: Ground, size: Any) -> str:
    config = json.loads(stage_file(ground.folder, 3).read_text(encoding="utf-8"))
    config["zero_optimization"]["zero_hpz_partition_size"] = size
    path = ground.folder / f"hpz-{size}.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def machines(ground: Ground, launch: Callable[..., tuple[int, str]]) -> Jobs:
    """Some steps of each pair, and DoRA's third again from the snapshot after the second."""
    jobs: Jobs = {}
    settings = {"max_steps": 2, "warmup_steps": 0, "save_strategy": "no", "keep_blocks": 0}
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    for name, changes in PAIRS.items():
        for hpz in (False, True):
            path = with_second_partition(ground, SIZES[name]) if hpz else None
            jobs[f"{name} {hpz}"] = ground.job(
                f"machines-{name.replace(' ', '-')}-{hpz}",
                "packable" if "quantization_bit" in changes else "tiny",
                **{**settings, **changes},
                deepspeed=path or str(stage_file(ground.folder, 3)),
            )
    whole = jobs["DoRA True"]
    snapshot = f"{whole['output_dir']}/checkpoint-2"
    jobs["DoRA on"] = {
        **whole,
        "output_dir": f"{whole['output_dir']}-on",
        "resume_from_checkpoint": snapshot,
    }
    whole |= {"save_strategy": "steps", "save_steps": 2}
    run_jobs(launch, RANKS, [*jobs.values()], MACHINES)
    return jobs


def once(job: dict[str, Any]) -> int:
    """Bytes of all parameters, as the run holds them."""
    size = 2 if job.get("bf16") else 4
    shape = read_model_config(Path(job["model_name_or_path"]), job.get("quantization_bit")).shape
    return shape.held_bytes(size) + size * sum(tensor.numel() for tensor in adapter(job).values())


@pytest.mark.parametrize("name", PAIRS)
def test_a_second_partition_changes_no_bit(machines: Jobs, name: str) -> None:
    plain, second = machines[f"{name} False"], machines[f"{name} True"]
    assert log(second, "loss") == log(plain, "loss")
    assert log(second, "grad_norm") == log(plain, "grad_norm")
    expected = adapter(plain)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in adapter(second).items())


def test_a_second_partition_is_made_anew_after_a_resume(machines: Jobs) -> None:
    whole, rest = machines["DoRA True"], machines["DoRA on"]
    assert log(rest, "current_steps") == [3]
    assert log(rest, "loss") == log(whole, "loss")[2:]
    assert log(rest, "grad_norm") == log(whole, "grad_norm")[2:]
    expected = adapter(whole)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in adapter(rest).items())


@pytest.mark.parametrize("name", PAIRS)
def test_weights_cross_between_machines_once_per_step_at_most(machines: Jobs, name: str) -> None:
    """Forward and backward gather the blocks, and hpZ leaves that within the machines."""
    plain, second = machines[f"{name} False"], machines[f"{name} True"]
    for ours, theirs in zip(costs(second), costs(plain), strict=True):
        assert theirs["crossing"] == theirs["gathered"]
        # The third step counts what the snapshot after the second took.
        assert theirs["crossing"][1] >= once(plain)
        assert ours["crossing"][1] < once(second) / 2 < ours["gathered"][1]


def planned(job: dict[str, Any]) -> Traffic:
    """What the plan says of a step of these ranks, each of which has one document in it."""
    settings = read_settings([f"--{key}={value}" for key, value in job.items()], "train")
    shape = read_model_config(settings.base, settings.model.quantization_bit).shape
    facts = Facts(MACHINES * RANKS, shape, bool(job.get("bf16")), machine_ranks=RANKS)
    config = resolve_ds_config(Path(job["deepspeed"]), settings.train, facts)
    found = memory_job(settings, shape, Zero.of(config), MACHINES * RANKS)
    if job["adapter_name_or_path"] != "null":
        found = replace(found, adapter=variant_shape(shape, {}))
    bf16 = settings.train.computes_in_bf16(on_gpu=False)
    return traffic(replace(found, bf16=bf16, machines=MACHINES))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("hpz", [False, True])
def test_the_plan_counts_what_the_ranks_gather(machines: Jobs, name: str, hpz: bool) -> None:
    expected = planned(machines[f"{name} {hpz}"])
    for counted in costs(machines[f"{name} {hpz}"]):
        in_groups = counted["gathered"][1] - counted["crossing"][1]
        assert counted["crossing"][1] == pytest.approx(expected.among_all, rel=0.02)
        assert in_groups == pytest.approx(expected.in_groups, rel=0.02)
        assert (in_groups > 0) is hpz


def test_machines_of_other_sizes_are_refused_on_every_rank() -> None:
    """Otherwise each rank waits for groups that the others do not make."""
    for rank in range(4):
        with pytest.raises(RequestError, match="the ranks take it for 2, 2, 1, 1, as their machi"):
            group_ranks([2, 2, 1, 1], rank, 1.0)
