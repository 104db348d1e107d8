"""Several training jobs in one set of processes, with what they cost.

-m tests.support.jobs JOBS.json, on ranks that share their imports.

JOBS.json is a list of settings (flat, as on the command line). Starting processes is what costs
on a small machine, so tests that need the same number of them share one start. Each job leaves in
its output_dir what `minilora.train` leaves, and costs.json: per rank the bytes read from the base
weights, the bytes that each optimizer step gathered, and those of them whose groups of ranks span
machines.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import deepspeed.comm.torch
import torch

from minilora.model.lora import lora_parameters
from minilora.processes.signals import Stopped
from minilora.processes.startup_times import StartupTimes
from minilora.processes.world import World
from minilora.settings.command_line import read_settings
from minilora.settings.errors import RequestError
from minilora.train import leave
from minilora.training.checks import check
from minilora.training.engine import Engine
from minilora.training.run import run_in

# What the step under way has gathered: in all, and in groups of ranks that span machines.
GATHERED: list[int] = [0, 0]


def spans_machines(group: Any) -> bool:
    ranks = torch.distributed.get_process_group_ranks(group)
    size = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or len(ranks)
    return len({rank // size for rank in ranks}) > 1


def count_gathered_bytes() -> None:
    """Wrap the function that DeepSpeed gathers with; before processes are joined."""
    backend = sys.modules["deepspeed.comm.torch"].TorchBackend
    original = backend.get_all_gather_function

    def counting(cls: Any) -> Any:
        function = original()

        def gather(output_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            GATHERED[0] += output_tensor.nbytes
            GATHERED[1] += output_tensor.nbytes * spans_machines(kwargs["group"])
            return function(output_tensor, *args, **kwargs)

        return gather

    backend.get_all_gather_function = classmethod(counting)


class Watch:
    """Notes what each engine of a job read, gathered per step, and held after loading."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.crossing: list[int] = []
        self.bytes_read = 0
        self.weights: dict[str, torch.Tensor] = {}
        self.keep_weights = False
        self.stop_after: int | None = None
        step, build = Engine.step, Engine.__init__

        def watched_step(engine: Engine, rate: float) -> float:
            norm = step(engine, rate)
            self.steps.append(GATHERED[0])
            self.crossing.append(GATHERED[1])
            GATHERED[:] = 0, 0
            if len(self.steps) + 1 == self.stop_after:
                os.kill(os.getpid(), signal.SIGTERM)  # noticed in the next step, the last one
            return norm

        def watched_build(engine: Engine, *args: Any) -> None:
            build(engine, *args)
            self.bytes_read = engine.bytes_read
            if self.keep_weights:
                self.weights = whole_weights(engine)
            self.steps, self.crossing, GATHERED[:] = [], [], (0, 0)

        Engine.step, Engine.__init__ = watched_step, watched_build  # type: ignore[method-assign]


def whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """All frozen parameters, gathered. Collective."""
    trained = {name for name, _ in lora_parameters(engine.model)}
    weights = {}
    for name, parameter in engine.model.named_parameters():
        if name not in trained:
            with deepspeed.zero.GatheredParameters([parameter], enabled=engine.stage == 3):
                weights[name] = parameter.detach().clone()
    return weights


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    count_gathered_bytes()
    watch, world = Watch(), None
    for job in jobs:
        watch.keep_weights = job.pop("keep_weights", False)
        watch.stop_after = job.pop("stop_after", None)
        refused = job.pop("refused", False)
        words = [f"--{key}={value}" for key, value in job.items()]
        settings = read_settings(words, "train")
        request = check(settings)
        world = world or World(settings.train)
        try:
            run_in(world, request, StartupTimes())
        except Stopped as stopped:
            assert watch.stop_after == len(watch.steps), stopped
        except RequestError as error:
            assert refused, error
            Path(job["output_dir"]).mkdir(exist_ok=True)
            problems = json.dumps(error.problems)
            (Path(job["output_dir"]) / "refused.json").write_text(problems, encoding="utf-8")
            continue
        assert not refused, job
        cost = {"bytes_read": watch.bytes_read, "gathered": watch.steps, "crossing": watch.crossing}
        costs = world.gather_objects(cost)
        output = Path(job["output_dir"])
        if world.rank == 0:
            (output / "costs.json").write_text(json.dumps(costs), encoding="utf-8")
            if watch.keep_weights:
                from safetensors.torch import save_file

                save_file({k: v.contiguous() for k, v in watch.weights.items()}, output / "whole")
    assert world is not None
    world.close()
    leave(0)


if __name__ == "__main__":
    main()
