"""What happens between optimizer steps: trial pass, log, validation, snapshots, and the end.

Everything here is collective: all ranks call it at the same step. Files are written by rank 0.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from minilora.data.steps import build_step, most_tokens, worst_span
from minilora.files.adapter import check_adapter, patiently, read_adapter, write_adapter
from minilora.files.rotation import prune
from minilora.files.snapshot import State, snapshot_folder, write_snapshot
from minilora.processes.signals import Stopped
from minilora.report.run_log import StepRecord
from minilora.settings.errors import RunError
from minilora.settings.keys import steps_of
from minilora.training.best_model import Best
from minilora.training.job import Job


def trial_pass(job: Job) -> None:
    """Compute the largest span that any step can have, so that a lack of memory shows at once.

    The loss is multiplied by zero, so the gradients that wait for the first step are exact zeros.
    The optimizer's step is not tried, for it would move the weights; by the memory plan it needs
    less than what is tried. Validation saves nothing for a backward pass, but may have longer
    documents, so its largest span is tried as well.
    """
    ranks = job.world.size
    tokens = most_tokens(job.schedule, ranks)
    span = worst_span(job.documents, tokens, job.limits)
    job.engine.forward_backward(span, 0.0, last=False)

    if job.validation is not None and job.settings.train.eval_strategy != "no":
        schedule = replace(job.schedule, lengths=job.validation.lengths, packing=False)
        tokens = most_tokens(schedule, ranks)
        job.engine.score(worst_span(job.validation, tokens, job.limits))


def write_log(job: Job, record: StepRecord) -> None:
    """Count a finished step in the log, hand it to DeepSpeed's monitors, and write due lines."""
    figures = {
        "loss": record.loss,
        "grad_norm": record.grad_norm,
        "learning_rate": record.learning_rate,
    }
    job.engine.monitor(record.step, figures)

    # Only a step that writes a line can fail on the disk, and only then do ranks have to agree.
    if job.log.writes_at(record.step):
        job.on_rank0(partial(job.log.step, record))
    else:
        job.log.step(record)


def after_step(job: Job, state: State, best: Best, signal_number: int) -> Best:
    """Validate and write a snapshot where they are due. Returns the best validation so far.

    Raises Stopped, once the snapshot is written, if a rank got a signal. The validation that is
    due at that step is then made up for by the run that resumes.
    """
    train = job.settings.train
    if is_due(job, state.step, train.eval_strategy, train.eval_every):
        best = replace(best, validation_pending=True)
        if not signal_number:
            best = validate(job, best, state.step)

    improved = train.load_best_model_at_end and best.step == state.step
    due = is_due(job, state.step, train.save_strategy, train.save_steps)
    if due or improved or signal_number:
        state = replace(state, log_totals=vars(job.log.totals), best=vars(best))
        write_checkpoint(job, state, to_resume=signal_number > 0)

    if signal_number:
        name = signal.Signals(signal_number).name
        raise Stopped(signal_number, f"{name}: stopped after step {state.step}")
    return best


def is_due(job: Job, steps_done: int, strategy: str, every: float) -> bool:
    """Whether a snapshot or validation follows now, by the rules of the HF Trainer.

    every: steps, or below 1 a share of the run.
    """
    if strategy == "no":
        return False
    if steps_done == job.schedule.total_steps:
        return True
    if strategy == "epoch":
        return job.schedule.epoch(steps_done - 1).is_integer()
    return steps_done % steps_of(every, job.schedule.total_steps) == 0


def make_up_validation(job: Job, state: State, best: Best) -> Best:
    """Do the validation that a signal kept the resumed run from doing."""
    if not best.validation_pending:
        return best
    best = validate(job, best, state.step)

    # A best step needs a snapshot that holds its adapter.
    is_there = job.world.rank == 0 and Path(best.folder).exists()
    is_there = job.world.gather_objects(is_there)[0]
    if job.settings.train.load_best_model_at_end and not is_there:
        write_checkpoint(job, replace(state, best=vars(best)))
    return best


def validate(job: Job, best: Best, step: int) -> Best:
    """Score the validation documents, log the scores, and return what is best now."""
    scores = evaluate(job)
    job.on_rank0(partial(job.log.evaluation, step, scores))

    metric = best.criterion[0]
    folder = snapshot_folder(job.settings.output, step)
    return best.after(step, scores[metric], str(folder.resolve()))


def evaluate(job: Job) -> dict[str, float]:
    """Loss and accuracy per labelled token of the validation documents."""
    documents = job.validation
    assert documents is not None, "settings that validate have validation documents"
    sums = np.zeros(2)  # loss, right guesses

    count = job.schedule.rows_per_step
    for start in range(0, len(documents), count):
        document_ids = np.arange(start, min(start + count, len(documents)))
        batch = build_step(documents, document_ids, 0, job.schedule, job.place, job.limits)
        for span in batch.spans:
            sums += np.array(job.engine.score(span).tolist())

    everyone = job.world.gather_numbers(sums.tolist())
    loss, accuracy = np.sum(everyone, axis=0) / documents.labelled.sum()
    perplexity = math.exp(min(loss, 700))  # exp(710) is more than a float64 holds
    return {"eval_loss": loss, "eval_perplexity": perplexity, "eval_accuracy": accuracy}


def write_checkpoint(job: Job, state: State, to_resume: bool = False) -> None:
    """Write checkpoint-N, read it back, and delete the oldest. Raises RunError.

    to_resume: somebody will resume from this one, so it has the optimizer's state even where
    save_only_model leaves that out of the others.
    """
    train, output = job.settings.train, job.settings.output
    adapter = dict(job.engine.trained_tensors())
    moments = {}
    if to_resume or not train.save_only_model:
        moments = dict(job.engine.moments())

    def write() -> None:
        folder = write_snapshot(output, state, adapter, moments, job.lora, job.base)
        check_adapter(folder, adapter)
        best = Path(state.best["folder"])
        job.log.warn(prune(output, train.save_total_limit, folder, best))

    job.on_rank0(write)
    job.world.announce_snapshot(output)


def finish(job: Job, best: Best) -> None:
    """Leave the last adapter, or the best, in output_dir, and check it. Raises RunError."""
    train, output = job.settings.train, job.settings.output
    adapter = dict(job.engine.trained_tensors())

    def write() -> None:
        if train.load_best_model_at_end and best.step:
            shapes = {name: tuple(tensor.shape) for name, tensor in adapter.items()}
            adapter.update(read_adapter(Path(best.folder), shapes))
            metric, _ = train.judged_by
            job.log.message(f"best: step {best.step}, with {metric} {best.value:.6g}")

        check_learned(adapter)
        bits = job.settings.model.quantization_bit
        patiently(partial(write_adapter, output, adapter, job.lora, job.base, bits))
        check_adapter(output, adapter)

    job.on_rank0(write)


def check_learned(adapter: Mapping[str, Tensor]) -> None:
    """Raise RunError if a lora_B is still all zeros, which is where every lora_B starts."""
    still = [name for name, b in adapter.items() if name.endswith("lora_B") and not b.any()]
    if still:
        raise RunError(
            f"{len(still)} of the adapter's matrices never moved from zero, {still[0]} first: "
            "the run learned nothing there; raise learning_rate, and begin anew"
        )
