"""Runs on several machines: two launchers on one computer, or ranks forked as two machines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from minilora.processes.ports import free_port
from tests.support.fault_cases import case
from tests.support.processes import HANGING_SECONDS
from tests.support.runs import Ground, stage_file

ROOT = Path(__file__).resolve().parent.parent.parent
Runs = dict[str, dict[str, Any]]
TWO = [[0], [1]]


def sound_jobs(ground: Ground, folder: Path) -> dict[str, dict[str, Any]]:
    """Jobs whose result must not depend on the machines; the last one goes on from the first."""
    common = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2,
              "lora_dropout": 0.3, "adapter_name_or_path": "null"}  # fmt: skip
    packed = {"model_name_or_path": str(ground.models["packable"]), "quantization_bit": 4}
    changes: Runs = {
        "ZeRO-3": {
            "stage": 3,
            "eval_dataset": str(ground.data),
            "eval_strategy": "steps",
            "eval_steps": 2,
            "load_best_model_at_end": True,
        },
        "ZeRO-2": {"stage": 2, "bf16": True},
        "ZeRO-0, DoRA": {"stage": 0, "use_dora": True},
        "ZeRO-3, DoRA, 4 bits": {"stage": 3, "use_dora": True, **packed},
    }
    snapshot = str(folder / "ZeRO-3/checkpoint-2")
    resumes = {"resume_from_checkpoint": snapshot}
    changes["resumed"] = {**changes["ZeRO-3"], **resumes}
    found = {}
    for name, change in changes.items():
        settings = {**common, **change}
        settings["deepspeed"] = str(stage_file(ground.folder, settings.pop("stage")))
        job = ground.job(name, "tiny", **settings)
        found[name] = {**job, "output_dir": str(folder / name)}
    return found


def jobs_case(ground: Ground, name: str, machines: list[list[int]]) -> dict[str, Any]:
    """All of `sound_jobs` in one set of forked ranks. Machine 1 has no folder of machine 0's."""
    folders = [ground.folder / f"{name}-{number}" for number in range(len(machines))]
    files = []
    for folder in folders:
        jobs = sound_jobs(ground, folder)
        file = folder.with_suffix(".json")
        file.write_text(json.dumps(list(jobs.values())), encoding="utf-8")
        files.append({"several": str(file)})
    own = {str(number): file for number, file in enumerate(files)}
    one = case(ground, name, ranks=sum(map(len, machines)), machines=machines, own=own)
    return {**one, "folders": [str(folder) for folder in folders]}


def machine_case(ground: Ground, name: str, *faults: dict[str, Any], **changes: Any) -> Any:
    """A case of test_ends_in_seconds on two machines. Only rank 0's has the output folder.

    machines: the ranks of each, one on each by default; own: settings of machine 1 alone
    """
    machines = changes.pop("machines", TWO)
    own = {"output_dir": "/nowhere/at/all", **changes.pop("own", {})}
    ranks = sum(map(len, machines))
    # What LLaMA-Factory's files say: whoever waits for it waits for ever.
    patience = {"ddp_timeout": 180_000_000}
    return case(
        ground, name, *faults, ranks=ranks, machines=machines, own={"1": own},
        **{**patience, **changes},
    )  # fmt: skip


def launch_two(
    launcher: str, counts: list[int], job: dict[str, Any], folder: Path
) -> list[tuple[int, str]]:
    """Start a launcher for each of two machines; returns exit code and output of each.

    The folder for temporary files has the same name on both, and is another one on each.
    """
    port = free_port()
    hosts = folder / "hosts"
    hosts.write_text("".join(f"m{n} slots={count}\n" for n, count in enumerate(counts)))
    started = []
    for number, count in enumerate(counts):
        own = {"output_dir": f"{job['output_dir']}-{number}"}
        words = [f"--{key}={value}" for key, value in {**job, **own}.items()]
        if launcher == "torchrun":
            command = ["torch.distributed.run", "--nnodes=2", f"--node-rank={number}",
                       f"--nproc-per-node={count}", "--master-addr=127.0.0.1",
                       f"--master-port={port}", "-m", "minilora.train"]  # fmt: skip
        else:
            command = ["deepspeed.launcher.runner", f"--hostfile={hosts}", "--no_ssh",
                       f"--node_rank={number}", "--master_addr=127.0.0.1",
                       f"--master_port={port}", "--module", "minilora.train"]  # fmt: skip
        place = folder / f"{launcher}-{number}"
        (place / "tmp").mkdir(parents=True)
        process = subprocess.Popen(
            [sys.executable, "-m", *command, *words], text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=place,
            env={**os.environ, "TMPDIR": "/proc/self/cwd/tmp", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        started.append(process)
    try:
        outputs = [process.communicate(timeout=HANGING_SECONDS)[0] for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return [(process.returncode, text) for process, text in zip(started, outputs, strict=True)]
