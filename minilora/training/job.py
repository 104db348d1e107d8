"""What a training loop works with: data, schedule, engine, log, and where it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from minilora.data.documents import Documents
from minilora.data.schedule import Schedule
from minilora.data.steps import Place, TileLimits
from minilora.data.tokenizer_files import TokenizerFiles
from minilora.files.snapshot import State
from minilora.model.lora_shape import LoraShape
from minilora.processes.world import World
from minilora.report.run_log import Report
from minilora.settings.errors import RequestError, RunError
from minilora.settings.settings import Settings
from minilora.training.engine import Engine


@dataclass(frozen=True)
class Job:
    """One run under way, the same on every rank except for `world`.

    settings: what the user asked for; limits: how the step is cut, as the memory plan decided
    schedule: of the training documents; validation: empty or absent where nothing is validated
    base: the base model's folder, and the tokenizer files that go beside each adapter
    start: where the run stood when it began, which is step 0 unless it resumed
    """

    world: World
    engine: Engine
    settings: Settings
    documents: Documents
    validation: Documents | None
    schedule: Schedule
    limits: TileLimits
    lora: LoraShape
    base: TokenizerFiles
    start: State
    log: Report

    @property
    def place(self) -> Place:
        """This process among all processes of the run."""
        return Place(self.world.rank, self.world.size)

    def on_rank0(self, write: Callable[[], None]) -> None:
        """Let rank 0 write files. Collective.

        Raises RunError on every rank if rank 0 could not, so that no rank waits for another.
        """
        problem = None
        if self.world.rank == 0:
            try:
                write()
            except OSError as error:
                place = error.filename or self.settings.output
                problem = f"{place} cannot be written: {error.strerror}"
            except (RunError, RequestError) as error:
                problem = str(error)

        problem = self.world.gather_objects(problem)[0]
        if problem:
            raise RunError(problem)
