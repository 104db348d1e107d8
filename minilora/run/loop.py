"""The training loop, in the order in which things happen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from minilora.config import RunError, Settings
from minilora.data.batches import Documents, Place, Step, TileLimits, build_step
from minilora.data.schedule import Schedule
from minilora.files.adapter import check_adapter, write_adapter
from minilora.model.lora import LoraShape
from minilora.run.engine import Engine, World
from minilora.run.memory import read_memory
from minilora.run.report import Report, StepRecord
from minilora.run.schedule import learning_rate


@dataclass(frozen=True)
class Job:
    """What is trained on, how, and where it goes."""

    settings: Settings
    documents: Documents
    schedule: Schedule
    lora: LoraShape

    @property
    def output(self) -> Path:
        assert self.settings.train.output_dir is not None
        return Path(self.settings.train.output_dir)


def train(world: World, engine: Engine, job: Job, report: Report) -> None:
    """Run all steps, save on the way, and leave a checked adapter in output_dir.

    Raises RunError on every rank for a loss or gradient that is not finite, a disk that cannot be
    written, or an adapter that did not learn.
    """
    settings, total = job.settings.train, job.schedule.total_steps
    limits = TileLimits(settings.tile_tokens, settings.gather_tokens)
    place = Place(world.rank, world.size)
    for step in range(total):
        rows = job.schedule.rows(step)
        batch = build_step(
            job.documents, rows, step=step, place=place, limits=limits, seed=settings.seed
        )
        # DeepSpeed averages gradients over ranks, so this makes them the mean over all tokens.
        scale = world.size / max(batch.labelled, 1)
        last = len(batch.spans) - 1
        losses = [
            engine.forward_backward(span, scale, last=index == last)
            for index, span in enumerate(batch.spans)
        ]
        loss, memory = _share(world, sum(map(float, losses)), step, batch)
        rate = learning_rate(step, total, settings)
        norm = engine.step(rate)
        record = StepRecord(
            step=step + 1,
            loss=loss,
            labelled=batch.labelled,
            tokens=batch.tokens,
            documents=len(rows),
            grad_norm=norm,
            learning_rate=rate,
            epoch=job.schedule.epoch(step),
            memory=memory,
        )
        report.step(record)
        if _save_is_due(job, step):
            save(world, engine, job, job.output / f"checkpoint-{step + 1}")
    save(world, engine, job, job.output)


def save(world: World, engine: Engine, job: Job, folder: Path) -> None:
    """Write and check the adapter on rank 0. Collective; raises RunError on every rank."""
    tensors = dict(engine.trained_tensors())
    problem = None
    if world.rank == 0:
        try:
            _check_learned(tensors)
            base = job.settings.model.model_name_or_path
            assert base is not None
            write_adapter(folder, tensors, job.lora, Path(base))
            check_adapter(folder, tensors)
        except OSError as error:
            problem = f"{folder} cannot be written: {error.strerror}"
        except RunError as error:
            problem = str(error)
    problem = world.gather_objects(problem)[0]
    if problem:
        raise RunError(problem)


def _share(world: World, local: float, step: int, batch: Step) -> tuple[float, dict[str, float]]:
    """The mean loss over all ranks' tokens, and the memory of the worst rank."""
    memory = read_memory(world.device)
    everyone = world.gather_numbers([local, *memory.values()])
    broken = [rank for rank, numbers in enumerate(everyone) if not math.isfinite(numbers[0])]
    if broken:
        rows = world.gather_objects(batch.local_rows.tolist())
        rank = broken[0]
        raise RunError(
            f"step {step + 1}: the loss is {everyone[rank][0]} on rank {rank}, which had the rows "
            f"{rows[rank]}; nothing was updated. Look at these rows, or lower learning_rate"
        )
    loss = sum(numbers[0] for numbers in everyone) / world.size
    worst = map(max, zip(*(numbers[1:] for numbers in everyone), strict=True))
    return loss, dict(zip(memory, worst, strict=True))


def _save_is_due(job: Job, step: int) -> bool:
    """Whether a snapshot follows this step (from 0); the end of the run saves by itself."""
    train = job.settings.train
    if step + 1 == job.schedule.total_steps or train.save_strategy == "no":
        return False
    if train.save_strategy == "epoch":
        return int(job.schedule.epoch(step)) > (int(job.schedule.epoch(step - 1)) if step else 0)
    return (step + 1) % train.save_steps == 0


def _check_learned(tensors: Mapping[str, Tensor]) -> None:
    still = [name for name, b in tensors.items() if name.endswith("lora_B") and not b.any()]
    if still:
        raise RunError(
            f"{len(still)} of the adapter's matrices never moved from zero, {still[0]} first: "
            "the run learned nothing there; is the learning rate 0?"
        )
