"""Which step validated best, and how long ago: what early stopping and the final adapter go by."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minilora.files.adapter import WEIGHTS
from minilora.files.snapshot import restored
from minilora.settings.settings import TrainSettings


@dataclass(frozen=True)
class Best:
    """The best validation of a run so far; snapshots keep it.

    by: what it was found by: metric, whether more is better, digest of the validation documents
    step, value: after which step, and the metric then; step 0 before the first validation
    folder: the snapshot of that step, if there is one
    since: validations after it, none of them better
    due: whether a signal came before the validation of the last step
    """

    by: list[Any] = field(default_factory=list)
    step: int = 0
    value: float = 0.0
    folder: str = ""
    since: int = 0
    due: bool = False

    def after(self, step: int, value: float, folder: str) -> Best:
        """What is best after the validation of a step; nan never is."""
        _, greater, _ = self.by
        better = value > self.value if greater else value < self.value
        if math.isfinite(value) and (better or not self.step):
            return Best(self.by, step, value, folder)
        return replace(self, since=self.since + 1, due=False)

    @property
    def results(self) -> dict[str, float]:
        """Lines of train_results.json, named as in the HF Trainer's state."""
        return {"best_metric": self.value, "best_global_step": self.step} if self.step else {}


def best_before(
    train: TrainSettings, saved: dict[str, Any], digest: str, snapshot: Path | None
) -> tuple[Best, list[str]]:
    """The best so far of a run that starts, and what its user should know of it.

    saved: the Best in the snapshot that it goes on from, or empty. digest: of the validation
    documents. A snapshot's best counts if it was found by the same, and is still there; its folder
    may have moved together with the one that the run goes on from. Raises RequestError as
    `restored` does.
    """
    fresh = Best(by=[*train.judged_by, digest])
    if not saved or snapshot is None or train.eval_strategy == "no":
        return fresh, []
    best = restored(Best, saved, snapshot)
    fresh = replace(fresh, due=best.due)
    if not best.step:
        return fresh, []
    if best.by != fresh.by:
        return fresh, ["the best is looked for anew: the metric or the validation data changed"]
    beside = snapshot.parent / Path(best.folder).name
    for folder in (Path(best.folder), beside):
        if (folder / WEIGHTS).is_file():
            return replace(best, folder=str(folder.resolve())), []
    if train.load_best_model_at_end:
        return fresh, [f"the best is looked for anew: {best.folder} is not there any more"]
    return best, []
