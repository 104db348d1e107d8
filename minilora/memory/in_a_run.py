"""The memory plan in a run: what is said at its start, when memory runs out, and at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from minilora.data.schedule import Schedule
from minilora.data.steps import most_tokens
from minilora.memory.measured import (
    free_memory,
    is_out_of_memory,
    moment_of,
    record_history,
    write_history,
)
from minilora.memory.peak import GIB
from minilora.memory.spare import Open, use_spare_memory
from minilora.memory.ways import Way, advice, nearest_that_fit
from minilora.memory.zero3_gathers import Zero
from minilora.model.lora_shape import LoraShape
from minilora.processes.world import World
from minilora.settings.errors import RequestError, RunError
from minilora.settings.settings import TrainSettings


class OutOfMemory(RunError):
    """An allocation failed on this rank. advice: lines to print below the message."""

    told = True
    advice: tuple[str, ...] = ()

    def tell(self, world: World) -> None:
        """Print the message and the advice, on one rank.

        As a rule all ranks run out at the same time. Then rank 0 speaks for all of them; else the
        rank that ran out, if rank 0 has not been lost.
        """
        if world.rank > 0:
            time.sleep(2)
        if world.rank == 0 or 0 not in world.watch.lost():
            print(f"error: {self}", *self.advice, sep="\n", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Forecast:
    """The memory plan of a run.

    asked: what the settings ask for, where every document is as long as they allow; decided: what
    the run does, with the real lengths of its documents and with what the settings leave to the
    run. files: the DeepSpeed files that could serve, by name. limit: bytes that a process can have,
    of its GPU or, on a CPU, of the machine's memory.
    """

    asked: Way
    decided: Way
    files: Mapping[str, Zero]
    limit: int

    def opening(self, strict: bool) -> list[str]:
        """Lines for the start: what is needed, and a warning if there is less.

        Raises RequestError instead of the warning if strict.
        """
        job, peak = self.decided.job, self.decided.peak
        parts = ", ".join(f"{name} {size / GIB:.3g}" for name, size in peak.parts.items())
        lines = [
            f"plan: peak of a {'GPU' if job.on_gpu else 'process'} {peak.total / GIB:.4g} GiB "
            f"({peak.peak_moment}), of {self.limit / GIB:.4g}: {parts}; steps of up to "
            f"{job.step_tokens:,} tokens per process, documents of up to {job.longest:,}"
        ]
        if peak.total > self.limit:
            fitting = nearest_that_fit(self.decided, self.files, self.limit)
            offers = "; or ".join(", ".join(way.changes(self.decided)) for way in fitting)
            problem = (
                f"the plan needs {peak.total / GIB:.4g} GiB, {self.limit / GIB:.4g} are free; "
                f"nearest settings that fit: {offers or 'none'}"
            )
            if strict:
                raise RequestError([f"strict_plan: {problem}"])
            lines.append(f"warning: {problem}")
        return lines

    @contextmanager
    def explaining(self, rank: int, train: TrainSettings) -> Iterator[None]:
        """Raise OutOfMemory, with advice, where memory runs out inside.

        With memory_snapshot the allocator's history is noted, and written when that happens.
        """
        if train.memory_snapshot:
            record_history()
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            moment = moment_of(error)
            reason = (str(error).splitlines() or [""])[0]
            failure = OutOfMemory(f"rank {rank}: out of memory (moment: {moment}): {reason}")
            failure.advice = tuple(self._advice(moment))
            if train.memory_snapshot:
                path = Path(train.output_dir or "", f"memory-{rank}.pickle")
                write_history(path)
                failure.advice += (f"  {path}: drag it to https://pytorch.org/memory_viz",)
            raise failure from error

    def _advice(self, moment: str) -> Iterator[str]:
        peak = self.decided.peak
        at_moment = peak.by_moment.get(moment)
        said = f"{at_moment / GIB:.4g} GiB of tensors at this moment, " if at_moment else ""
        limit = f"{self.limit / GIB:.4g} GiB"
        yield f"  the plan said {said}{peak.total / GIB:.4g} GiB at the peak; there are {limit}"

        changes = advice(self.decided, self.files, moment, self.limit)
        for number, change in enumerate(changes, 1):
            yield f"  {number}. {change}"
        if not changes:
            yield "  no setting would save anything there: is something else using this memory?"

    def closing(self, ranks: Sequence[Mapping[str, float]]) -> str:
        """One line for the end: predicted beside measured.

        ranks: what read_memory returned on each of them, in GiB.
        """
        peak = self.decided.peak
        most = {name: max(figures[name] for figures in ranks) for name in ranks[0]}
        predicted = f"memory at the peak: predicted {peak.tensors / GIB:.4g} GiB of tensors"
        if not self.decided.job.on_gpu:
            return (
                f"{predicted}, not measured: on a CPU only whole processes can be, of up to "
                f"{most['rss_peak_gib']:.4g} GiB with Python and its libraries"
            )
        return (
            f"{predicted}, measured {most['gpu_memory_allocated_gib']:.4g} on the GPU that took "
            f"most; with context and slack predicted {peak.total / GIB:.4g}, in use "
            f"{most['gpu_memory_used_gib']:.4g} (reserved by torch "
            f"{most['gpu_memory_reserved_gib']:.4g})"
        )


def foresee(
    world: World,
    asked: Way,
    files: Mapping[str, Zero],
    lora: LoraShape,
    schedule: Schedule,
    left_open: Open,
) -> Forecast:
    """The plan with the real lengths of the data, and with the memory that is free. Collective.

    asked, files: as asked_way returns them; lora: the adapter, which may continue another one;
    left_open: what the run decides by itself.
    """
    job = replace(
        asked.job,
        adapter=lora,
        step_tokens=most_tokens(schedule, world.size),
        longest=int(schedule.lengths.max()),
        on_gpu=world.device.type == "cuda",
    )
    # The ranks must decide the same, so that the one with the least memory decides.
    free = min(world.gather_objects(free_memory(world.device, world.sharing)))
    decided = use_spare_memory(job, free, left_open)
    return Forecast(asked, Way(asked.file, decided), files, free)
