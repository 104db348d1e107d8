"""The training loop, in the order in which things happen."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from minilora.data.documents import Documents
from minilora.data.schedule import Schedule
from minilora.data.steps import Place, Step, TileLimits, build_step, most_tokens, worst_span
from minilora.files.adapter import AdapterBase, check_adapter, read_adapter, write_adapter
from minilora.files.snapshot import State, prune, snapshot_folder, write_snapshot
from minilora.memory.measured import read_memory
from minilora.model.lora_shape import LoraShape
from minilora.processes.signals import Stopped, StopRequest
from minilora.processes.world import World
from minilora.report.run_log import Report, StepRecord
from minilora.settings.errors import RequestError, RunError
from minilora.settings.settings import Settings
from minilora.training.best_model import Best
from minilora.training.engine import Engine
from minilora.training.learning_rate import learning_rate


@dataclass(frozen=True)
class Job:
    """What is trained on, how, where it goes, and where it starts."""

    settings: Settings
    documents: Documents
    schedule: Schedule
    lora: LoraShape
    base: AdapterBase
    start: State
    validation: Documents | None = None


def train(world: World, engine: Engine, job: Job, report: Report) -> Best:
    """Run all steps, take snapshots on the way, and leave a checked adapter in output_dir.

    Returns the best validation. Raises, on every rank, RunError for a loss or gradient that is not
    finite, a disk that cannot be written, or an adapter that did not learn; Stopped after a signal,
    the snapshot written.
    """
    state, train = job.start, job.settings.train
    best, patience = Best(**state.best), train.early_stopping_steps or math.inf
    with StopRequest() as stop:
        probe(world, engine, job)
        if best.due:
            best = validate(world, engine, job, report, best, state.step)
            if train.load_best_model_at_end and not Path(best.folder).exists():
                snapshot(world, engine, job, replace(state, best=vars(best)))
        for step in range(job.start.step, job.schedule.total_steps):
            if best.since >= patience:
                report.message(f"stopping early: no validation since step {best.step} was better")
                break
            record, number = _step(world, engine, job, step, stop)
            state = replace(state, step=step + 1, rows=state.rows + record.documents)
            _on_rank0(world, job, partial(report.step, record), report.writes_at(step + 1))
            if _is_due(job, step, train.eval_strategy, train.eval_every):
                best = replace(best, due=True)
                if not number:
                    best = validate(world, engine, job, report, best, step + 1)
            better = train.load_best_model_at_end and best.step == step + 1
            if number or better or _is_due(job, step, train.save_strategy, train.save_steps):
                state = replace(state, log_totals=vars(report.totals), best=vars(best))
                snapshot(world, engine, job, state, stopping=number > 0)
            if number:
                name = signal.Signals(number).name
                raise Stopped(number, f"{name}: stopped after step {step + 1}")
    finish(world, engine, job, report, best)
    return best


def probe(world: World, engine: Engine, job: Job) -> None:
    """Compute the fullest span there can be, so that running out of memory shows now. Collective.

    The loss is multiplied by zero: the gradients that wait for the first step are exact zeros.
    Validation keeps nothing for a backward, but may have longer documents. The optimizer's step is
    not tried, for it would move the weights; by the plan it needs less than what is tried.
    """
    train, schedule = job.settings.train, job.schedule
    limits = TileLimits(train.tile_tokens, train.gather_tokens)
    span = worst_span(job.documents, most_tokens(schedule, world.size), limits)
    engine.forward_backward(span, 0.0, last=False)
    if job.validation is not None and train.eval_strategy != "no":
        whole = replace(schedule, lengths=job.validation.lengths, packing=False)
        engine.score(worst_span(job.validation, most_tokens(whole, world.size), limits))


def _batch(
    world: World, job: Job, documents: Documents, rows: NDArray[np.int64], step: int = 0
) -> Step:
    """This rank's part of these documents."""
    train = job.settings.train
    return build_step(
        documents,
        rows,
        step,
        job.schedule,
        Place(world.rank, world.size),
        TileLimits(train.tile_tokens, train.gather_tokens),
    )


def _step(
    world: World, engine: Engine, job: Job, step: int, stop: StopRequest
) -> tuple[StepRecord, int]:
    """One optimizer step. Returns what it did, and the signal that some rank got, or 0."""
    begin = time.monotonic()
    settings, rows = job.settings.train, job.schedule.rows(step)
    batch = _batch(world, job, job.documents, rows, step)
    # DeepSpeed averages gradients over ranks, so this makes them the mean over all tokens.
    scale = world.size / max(batch.labelled, 1)
    last = len(batch.spans) - 1
    losses = [
        engine.forward_backward(span, scale, last=index == last)
        for index, span in enumerate(batch.spans)
    ]
    loss, number, memory = _share(world, sum(map(float, losses)), stop, step, batch)
    rate = learning_rate(step, job.schedule.total_steps, settings)
    try:
        norm = engine.step(rate)
    except RunError as error:
        raise RunError(f"step {step + 1}: {error}") from None
    engine.monitor(step + 1, {"loss": loss, "grad_norm": norm, "learning_rate": rate})
    record = StepRecord(
        step=step + 1,
        loss=loss,
        labelled=batch.labelled,
        tokens=batch.tokens,
        documents=len(rows),
        grad_norm=norm,
        learning_rate=rate,
        epoch=job.schedule.epoch(step),
        seconds=time.monotonic() - begin,
        memory=memory,
    )
    return record, number


def _share(
    world: World, local: float, stop: StopRequest, step: int, batch: Step
) -> tuple[float, int, Mapping[str, Sequence[float]]]:
    """The mean loss over all ranks' tokens, a signal if any, and the memory of every rank."""
    memory = read_memory(world.device)
    everyone = world.gather_numbers([local, stop.number, *memory.values()])
    broken = [rank for rank, numbers in enumerate(everyone) if not math.isfinite(numbers[0])]
    if broken:
        rows = world.gather_objects(batch.local_rows.tolist())
        rank = broken[0]
        raise RunError(
            f"step {step + 1}: the loss is {everyone[rank][0]} on rank {rank}, which had the rows "
            f"{rows[rank]}; nothing was updated. Look at these rows, or lower learning_rate"
        )
    losses, numbers, *memories = zip(*everyone, strict=True)
    each: Mapping[str, Sequence[float]] = dict(zip(memory, memories, strict=True))
    return sum(losses) / world.size, int(max(numbers)), each


def validate(world: World, engine: Engine, job: Job, report: Report, best: Best, step: int) -> Best:
    """Write the scores after a step into the log; return what is best now. Collective."""
    scores = evaluate(world, engine, job)
    _on_rank0(world, job, partial(report.evaluation, step, scores))
    return best.after(
        step, scores[best.by[0]], str(snapshot_folder(job.settings.output, step).resolve())
    )


def evaluate(world: World, engine: Engine, job: Job) -> dict[str, float]:
    """Loss and accuracy per labelled token of the validation documents. Collective."""
    documents = job.validation
    assert documents is not None
    sums = np.zeros(2)
    for start in range(0, len(documents), job.schedule.rows_per_step):
        rows = np.arange(start, min(start + job.schedule.rows_per_step, len(documents)))
        batch = _batch(world, job, documents, rows)
        for span in batch.spans:
            sums += np.array(engine.score(span).tolist())
    loss, right = np.sum(world.gather_numbers(sums.tolist()), axis=0) / documents.labelled.sum()
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700)), "eval_accuracy": right}


def snapshot(world: World, engine: Engine, job: Job, state: State, stopping: bool = False) -> None:
    """Write checkpoint-N on rank 0 and delete the oldest. Collective; raises RunError.

    stopping: this one is to be gone on from, whatever save_only_model says of the others.
    """
    train = job.settings.train
    adapter = dict(engine.trained_tensors())
    moments = dict(engine.moments()) if stopping or not train.save_only_model else {}

    def write() -> None:
        folder = write_snapshot(job.settings.output, state, adapter, moments, job.lora, job.base)
        check_adapter(folder, adapter)
        prune(job.settings.output, train.save_total_limit, folder, Path(state.best["folder"]))

    _on_rank0(world, job, write)


def finish(world: World, engine: Engine, job: Job, report: Report, best: Best) -> None:
    """Write and check the adapter, the last or the best. Collective; raises RunError."""
    adapter = dict(engine.trained_tensors())
    train = job.settings.train

    def write() -> None:
        if train.load_best_model_at_end and best.step:
            shapes = {name: tuple(tensor.shape) for name, tensor in adapter.items()}
            adapter.update(read_adapter(Path(best.folder), shapes))
            metric, _ = train.judged_by
            report.message(f"best: step {best.step}, with {metric} {best.value:.6g}")
        _check_learned(adapter)
        write_adapter(job.settings.output, adapter, job.lora, job.base)
        check_adapter(job.settings.output, adapter)

    _on_rank0(world, job, write)


def _on_rank0(world: World, job: Job, work: Callable[[], None], writes: bool = True) -> None:
    """Let rank 0 work; if it writes and cannot, every rank raises RunError. Collective then."""
    if not writes:
        return work()
    problem = None
    if world.rank == 0:
        try:
            work()
        except OSError as error:
            problem = f"{error.filename or job.settings.output} cannot be written: {error.strerror}"
        except (RunError, RequestError) as error:
            problem = str(error)
    problem = world.gather_objects(problem)[0]
    if problem:
        raise RunError(problem)


def _is_due(job: Job, step: int, strategy: str, every: int) -> bool:
    """Whether a snapshot or validation follows this step (from 0); as in the HF Trainer."""
    if strategy == "no":
        return False
    if step + 1 == job.schedule.total_steps:
        return True
    if strategy == "epoch":
        return job.schedule.epoch(step).is_integer()
    return (step + 1) % every == 0


def _check_learned(tensors: Mapping[str, Tensor]) -> None:
    still = [name for name, b in tensors.items() if name.endswith("lora_B") and not b.any()]
    if still:
        raise RunError(
            f"{len(still)} of the adapter's matrices never moved from zero, {still[0]} first: "
            "the run learned nothing there; is the learning rate 0?"
        )
