"""What is left to train: it may be nothing, or steps at which nothing would be learned."""

from __future__ import annotations

import filecmp
from pathlib import Path

from minilora.files.adapter import WEIGHTS
from minilora.report.run_log import RESULTS
from minilora.settings.errors import RequestError
from minilora.settings.settings import Settings
from minilora.training.best_model import Best
from minilora.training.learning_rate import learning_rate, warmup_steps
from minilora.training.starting_point import StartingPoint


def check_rates(settings: Settings, first_step: int, total_steps: int) -> None:
    """Raise RequestError if the learning rate is 0 at all steps that are left."""
    train = settings.train
    rates = (learning_rate(step, total_steps, train) for step in range(first_step, total_steps))
    if first_step >= total_steps or any(rates):
        return
    warmup = warmup_steps(total_steps, train)
    key = "warmup_steps" if train.warmup_steps else "warmup_ratio"
    raise RequestError(
        [
            f"{settings.name_of(key)}: the learning rate would be 0 in every step: the run has "
            f"{total_steps} in all, and the warm-up of {warmup} begins at 0; set {key}: 0, or "
            "train for more steps"
        ]
    )


def nothing_left(start: StartingPoint, settings: Settings, total_steps: int) -> str | None:
    """A line for a run that resumes and has no step left; None if it has one."""
    step, best = start.state.step, Best(**start.state.best)
    # A signal may have come before the validation of the last step.
    if start.snapshot is None or best.validation_pending:
        return None
    patience = settings.train.early_stopping_steps
    if patience and best.validations_without_gain >= patience:
        reason = f"the run stopped early, for no validation since step {best.step} was better"
        return f"nothing is left to train: {reason}; raise early_stopping_steps to go on"
    if step < total_steps:
        return None
    return (
        f"nothing is left to train: {start.snapshot} was written after step {step}, and the run "
        f"has {total_steps}; raise num_train_epochs or max_steps to go on"
    )


def is_finished(start: StartingPoint, settings: Settings) -> bool:
    """Whether output_dir holds all that a run leaves which ends where `start` stands.

    A run may have been killed between its last snapshot and its end.
    """
    assert start.snapshot is not None
    source, best = start.snapshot, start.state.best
    if settings.train.load_best_model_at_end and best["step"]:
        source = Path(best["folder"])
    files = (source / WEIGHTS, settings.output / WEIGHTS)
    if not (settings.output / RESULTS).is_file() or not all(file.is_file() for file in files):
        return False
    return filecmp.cmp(*files, shallow=False)
