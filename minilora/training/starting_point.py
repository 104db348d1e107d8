"""Where a run starts: at the beginning, or from a snapshot that it could have written itself."""

from __future__ import annotations

from dataclasses import asdict, replace
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
from minilora.settings.settings import Settings
from minilora.training.best_model import best_before
from minilora.training.engine import MOMENTS, ModelRecipe

# Settings of training that must not change between a snapshot and the run that goes on from it.
UNCHANGING = (
    "learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "weight_decay",
    "loraplus_lr_ratio", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "seed",
    "disable_shuffling",
)  # fmt: skip


def start_of(
    settings: Settings, plan: ModelRecipe, documents: Documents, validation: Documents
) -> tuple[Path | None, State, dict[str, Tensor]]:
    """The snapshot to go on from, where it stood and its tensors; or None and the beginning.

    Raises RequestError if a snapshot is broken, or this run could not have written it.
    """
    same = {
        "base weights": fingerprint(plan.checkpoint),
        "data": documents.fingerprint(),
        "lora": asdict(plan.lora),
        "packing": settings.packs,
        **{key: getattr(settings.train, key) for key in UNCHANGING},
    }
    output = settings.output
    folder = find_snapshot(output, settings.train.resume_from_checkpoint)
    state = State(0, 0, {}, same, {}) if folder is None else read_state(folder)
    best, notes = best_before(settings.train, state.best, validation.fingerprint(), folder)
    state = replace(state, best=vars(best), about={**state.about, "notes": notes})
    if folder is None:
        return None, state, {}
    restored(Totals, state.log_totals, folder)  # refused now, not when the log is opened
    problems = differences(state, same, folder)
    if problems:
        raise RequestError(problems)
    shapes = plan.lora.parameter_shapes(plan.checkpoint.shape)
    moments = {f"{name}.{moment}": size for name, size in shapes.items() for moment in MOMENTS}
    return folder, state, read_tensors(folder, shapes | moments)
