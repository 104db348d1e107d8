"""Where a run starts: at step 0, or at a snapshot that the same run could have written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from minilora.data.documents import Documents
from minilora.files.records import restored
from minilora.files.snapshot import State, find_snapshot, read_state, read_tensors
from minilora.processes.world import World
from minilora.report.run_log import Totals
from minilora.settings.errors import RequestError
from minilora.training.best_model import best_before
from minilora.training.checks import CheckedRequest
from minilora.training.engine import MOMENTS
from minilora.training.same_run import WEIGHTS, differences, known_before_loading


@dataclass(frozen=True)
class StartingPoint:
    """Where a run starts.

    snapshot: the folder to resume from, or None at the beginning; state: where the run stood
    tensors: masters and moments by name; empty at the beginning, and on all ranks but the first
    notes: lines for the user
    """

    snapshot: Path | None
    state: State
    tensors: dict[str, Tensor]
    notes: list[str]

    def state_with(self, about: dict[str, Any], base_digest: Mapping[str, str]) -> State:
        """The state of a run whose base weights have been read.

        about: this run's; base_digest: of training.same_run. Raises RequestError if the snapshot
        was made with other base weights.
        """
        weights = {WEIGHTS: dict(base_digest)}
        if self.snapshot is not None:
            problems = differences(self.state, State(0, 0, {}, weights, about), self.snapshot)
            if problems:
                raise RequestError(problems)
        return replace(self.state, must_match={**self.state.must_match, **weights}, about=about)


def starting_point(
    request: CheckedRequest, documents: Documents, validation: Documents, about: dict[str, Any]
) -> StartingPoint:
    """Find and read the snapshot that is asked for, if any.

    about: what this run tells of itself (training.same_run compares with it).
    Raises RequestError if a snapshot is broken, or if this run could not have written it.
    """
    settings = request.settings
    same = known_before_loading(settings, request.lora, documents)
    folder = find_snapshot(settings.output, settings.train.resume_from_checkpoint)
    state = State(0, 0, {}, same, {})
    if folder is not None:
        state = read_state(folder)

    best, notes = best_before(settings.train, state.best, validation.fingerprint(), folder)
    state = replace(state, best=vars(best))
    if folder is None:
        return StartingPoint(None, state, {}, notes)

    restored(Totals, state.log_totals, folder)  # refused now, not when the log is opened
    problems = differences(state, State(0, 0, {}, same, about), folder)
    if problems:
        raise RequestError(problems)
    shapes = request.lora.parameter_shapes(request.checkpoint.shape)
    moments = {f"{name}.{moment}": size for name, size in shapes.items() for moment in MOMENTS}
    return StartingPoint(folder, state, read_tensors(folder, shapes | moments), notes)


def shared_starting_point(
    world: World,
    request: CheckedRequest,
    documents: Documents,
    validation: Documents,
    about: dict[str, Any],
) -> StartingPoint:
    """What `starting_point` finds on rank 0, for all. Collective.

    Snapshots lie on rank 0's machine, and the others need none: only rank 0 has the tensors, and
    hands them on when they are put back.
    """
    found: StartingPoint | None = None
    with world.agreed():
        if world.rank == 0:
            found = starting_point(request, documents, validation, about)
    without_tensors = replace(found, tensors={}) if found is not None else None
    shared: StartingPoint = world.gather_objects(without_tensors)[0]
    return found or shared
