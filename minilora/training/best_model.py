"""Which validation was the best, and how many since were not better.

The adapter that is left at the end, and early stopping, go by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minilora.files.adapter import WEIGHTS
from minilora.files.records import restored
from minilora.settings.settings import TrainSettings


@dataclass(frozen=True)
class Best:
    """The best validation of a run so far; snapshots store it.

    criterion: what it was found by: metric, whether more is better, digest of the validation data
    step, value: after which step, and the metric then; step 0 before the first validation
    folder: the snapshot of that step, if there is one
    validations_without_gain: validations since then, none of them better
    validation_pending: whether a signal came before the validation of the last step was done
    """

    criterion: list[Any] = field(default_factory=list)
    step: int = 0
    value: float = 0.0
    folder: str = ""
    validations_without_gain: int = 0
    validation_pending: bool = False

    def after(self, step: int, value: float, folder: str) -> Best:
        """What is best after the validation of a step; a value that is not finite never is."""
        _, greater, _ = self.criterion
        better = value > self.value if greater else value < self.value
        if math.isfinite(value) and (better or not self.step):
            return Best(self.criterion, step, value, folder)
        return replace(
            self,
            validations_without_gain=self.validations_without_gain + 1,
            validation_pending=False,
        )

    @property
    def results(self) -> dict[str, float]:
        """Lines of train_results.json, named as in the HF Trainer's state."""
        if not self.step:
            return {}
        return {"best_metric": self.value, "best_global_step": self.step}


def best_before(
    train: TrainSettings, saved: dict[str, Any], digest: str, snapshot: Path | None
) -> tuple[Best, list[str]]:
    """The best so far of a run that starts, and what its user should know of it.

    saved: the Best in the snapshot that the run resumes from, or empty; digest: of the validation
    documents. A stored best counts only if it was found by the same criterion, and if its snapshot
    is still there. Raises RequestError for a snapshot of another version of minilora.
    """
    fresh = Best(criterion=[*train.judged_by, digest])
    if not saved or snapshot is None or train.eval_strategy == "no":
        return fresh, []

    best = restored(Best, saved, snapshot)
    fresh = replace(fresh, validation_pending=best.validation_pending)
    if not best.step:
        return fresh, []
    if best.criterion != fresh.criterion:
        return fresh, ["the best is looked for anew: the metric or the validation data changed"]

    # The output folder may have been moved as a whole since the snapshot was written.
    moved = snapshot.parent / Path(best.folder).name
    for folder in (Path(best.folder), moved):
        if (folder / WEIGHTS).is_file():
            return replace(best, folder=str(folder.resolve())), []
    if train.load_best_model_at_end:
        return fresh, [f"the best is looked for anew: {best.folder} is not there any more"]
    return best, []
