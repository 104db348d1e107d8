"""Where a run starts: at step 0, or at a snapshot that the same run could have written."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from minilora.data.documents import Documents
from minilora.files.snapshot import (
    State,
    differences,
    find_snapshot,
    read_state,
    read_tensors,
    restored,
)
from minilora.files.weights import fingerprint
from minilora.report.run_log import Totals
from minilora.settings.errors import RequestError
from minilora.training.best_model import best_before
from minilora.training.checks import CheckedRequest
from minilora.training.engine import MOMENTS

# Settings that must not change between a snapshot and the run that resumes from it: with another
# value the steps before and after the snapshot would belong to two different runs.
UNCHANGING = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "warmup_steps",
    "weight_decay",
    "loraplus_lr_ratio",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "seed",
    "disable_shuffling",
)


@dataclass(frozen=True)
class StartingPoint:
    """Where a run starts.

    snapshot: the folder to resume from, or None at the beginning; state: where the run stood
    tensors: masters and moments by name, empty at the beginning
    notes: lines for the user
    """

    snapshot: Path | None
    state: State
    tensors: dict[str, Tensor]
    notes: list[str]


def starting_point(
    request: CheckedRequest, documents: Documents, validation: Documents
) -> StartingPoint:
    """Find and read the snapshot that is asked for, if any.

    Raises RequestError if a snapshot is broken, or if this run could not have written it.
    """
    settings = request.settings
    same = {
        "base weights": fingerprint(request.checkpoint),
        "data": documents.fingerprint(),
        "lora": asdict(request.lora),
        "packing": settings.packs,
        "quantization_bit": settings.model.quantization_bit,
        **{key: getattr(settings.train, key) for key in UNCHANGING},
    }
    folder = find_snapshot(settings.output, settings.train.resume_from_checkpoint)
    state = State(0, 0, {}, same, {})
    if folder is not None:
        state = read_state(folder)

    best, notes = best_before(settings.train, state.best, validation.fingerprint(), folder)
    state = replace(state, best=vars(best))
    if folder is None:
        return StartingPoint(None, state, {}, notes)

    restored(Totals, state.log_totals, folder)  # refused now, not when the log is opened
    problems = differences(state, same, folder)
    if problems:
        raise RequestError(problems)
    shapes = request.lora.parameter_shapes(request.checkpoint.shape)
    moments = {f"{name}.{moment}": size for name, size in shapes.items() for moment in MOMENTS}
    return StartingPoint(folder, state, read_tensors(folder, shapes | moments), notes)
