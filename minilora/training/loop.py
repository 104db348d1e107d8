"""The training loop. Start reading here: `train_step` is one optimizer step, top to bottom.

What happens between the steps (trial pass, validation, snapshots, the end) is in milestones.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from minilora.data.steps import Step, build_step
from minilora.memory.measured import read_memory
from minilora.processes.signals import StopRequest
from minilora.report.run_log import StepRecord
from minilora.settings.errors import RunError
from minilora.training import milestones
from minilora.training.best_model import Best
from minilora.training.job import Job
from minilora.training.learning_rate import learning_rate


def train_step(job: Job, step: int, stop: StopRequest) -> tuple[StepRecord, int]:
    """One optimizer step, counted from 0. Collective.

    Returns what was done, and the signal that asked some rank to stop, or 0.
    """
    began = time.monotonic()
    rate = learning_rate(step, job.schedule.total_steps, job.settings.train)

    # This rank's part of the step's documents, cut into spans. A span is what shares one gather of
    # each block. All ranks have equally many spans, so all make the same collectives.
    document_ids = job.schedule.document_ids(step)
    batch = build_step(job.documents, document_ids, step, job.schedule, job.place, job.limits)

    # The loss is a sum over labelled tokens, divided by the labelled tokens of the whole step on
    # all ranks. DeepSpeed averages gradients over ranks, so the number of ranks is multiplied in:
    # the gradient is the exact mean over tokens, however they are split over ranks and spans.
    scale = job.world.size / max(batch.labelled, 1)
    losses = []
    for index, span in enumerate(batch.spans):
        last = index == len(batch.spans) - 1
        losses.append(job.engine.forward_backward(span, scale, last))

    # Every rank learns the loss, the memory and the signals of all before anything is updated.
    local_loss = sum(map(float, losses))
    loss, signal_number, memory = share(job, batch, local_loss, stop.number)

    # Clip the gradient, and let AdamW update LoRA.
    grad_norm = job.engine.step(rate)

    record = StepRecord(
        step=step + 1,
        loss=loss,
        labelled=batch.labelled,
        tokens=batch.tokens,
        documents=len(document_ids),
        grad_norm=grad_norm,
        learning_rate=rate,
        epoch=job.schedule.epoch(step),
        seconds=time.monotonic() - began,
        memory=memory,
    )
    return record, signal_number


def share(
    job: Job, batch: Step, local_loss: float, signal_number: int
) -> tuple[float, int, Mapping[str, Sequence[float]]]:
    """Gather the loss, a signal, and the memory figures of all ranks. Collective.

    Returns the mean loss over the labelled tokens of all ranks, a signal if any rank got one, and
    each memory figure by rank. Raises RunError, on every rank, if a rank's loss is not finite.
    """
    mine = read_memory(job.world.device)
    everyone = job.world.gather_numbers([local_loss, signal_number, *mine.values()])
    losses, signals, *figures = zip(*everyone, strict=True)

    broken = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    if broken:
        rank = broken[0]
        rows = job.world.gather_objects(batch.local_ids.tolist())[rank]
        raise RunError(
            f"the loss is {losses[rank]} on rank {rank}, which had the rows "
            f"{rows}; nothing was updated. Look at these rows, or lower learning_rate"
        )

    # Each rank's loss is its sum times the number of ranks, so their mean is the loss of the step.
    loss = sum(losses) / job.world.size
    return loss, int(max(signals)), dict(zip(mine, figures, strict=True))


def train(job: Job) -> Best:
    """Run all steps, write snapshots on the way, and leave a checked adapter in output_dir.

    Collective. Returns the best validation. Raises, on every rank, RunError for a loss or gradient
    that is not finite, a disk that cannot be written, or an adapter that did not learn; Stopped
    after a signal, once the snapshot is written.
    """
    state, best = job.start, Best(**job.start.best)
    patience = job.settings.train.early_stopping_steps or math.inf

    with StopRequest() as stop:
        milestones.trial_pass(job)
        best = milestones.make_up_validation(job, state, best)

        for step in range(job.start.step, job.schedule.total_steps):
            if best.validations_without_gain >= patience:
                job.log.message(f"stopping early: no validation since step {best.step} was better")
                break

            try:
                record, signal_number = train_step(job, step, stop)
            except RunError as error:
                raise RunError(f"step {step + 1}: {error}") from None
            state = replace(state, step=step + 1, rows=state.rows + record.documents)
            milestones.write_log(job, record)
            best = milestones.after_step(job, state, best, signal_number)

    milestones.finish(job, best)
    return best
