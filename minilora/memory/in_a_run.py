"""What the plan says of a run under way: at its start, when memory runs out, and at its end."""

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
    phase_of,
    record_history,
    write_history,
)
from minilora.memory.peak import GIB, budget
from minilora.memory.ways import Way, advice, keep_most_blocks, nearest_that_fit
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
        """As a rule all ranks run out at once: then rank 0 speaks for all, else whoever did."""
        time.sleep(2 * (world.rank > 0))
        if world.rank == 0 or 0 not in world.watch.lost():
            print(f"error: {self}", *self.advice, sep="\n", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Forecast:
    """The plan of a run, with the real lengths of its data.

    files: the DeepSpeed files that could serve; limit: bytes that a process can have, of its GPU
    or, on a CPU, of the machine's memory.
    """

    asked: Way
    files: Mapping[str, Zero]
    limit: int

    def opening(self, strict: bool) -> list[str]:
        """What is needed, of how much, and for what; and a warning if that does not fit.

        Raises RequestError instead of the warning if strict.
        """
        setup, needs = self.asked.setup, self.asked.budget
        parts = ", ".join(f"{name} {size / GIB:.3g}" for name, size in needs.parts.items())
        lines = [
            f"plan: {needs.total / GIB:.4g} GiB per {'GPU' if setup.on_gpu else 'process'} at the "
            f"fullest ({needs.fullest}), of {self.limit / GIB:.4g}: {parts}; steps of up to "
            f"{setup.step_tokens:,} tokens per process, documents of up to {setup.longest:,}"
        ]
        if needs.total > self.limit:
            fitting = nearest_that_fit(self.asked, self.files, self.limit)
            offers = [", ".join(option.changes(self.asked)) for option in fitting]
            problem = (
                f"the plan needs {needs.total / GIB:.4g} GiB, {self.limit / GIB:.4g} are free; "
                f"nearest settings that fit: {'; or '.join(offers) or 'none'}"
            )
            if strict:
                raise RequestError([f"strict_plan: {problem}"])
            lines.append(f"warning: {problem}")
        return lines

    @contextmanager
    def explaining(self, rank: int, train: TrainSettings) -> Iterator[None]:
        """Raise OutOfMemory, with advice, if memory runs out inside; write its history if asked."""
        if train.memory_snapshot:
            record_history()
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            phase, (reason, *_) = phase_of(error), str(error).splitlines() or [""]
            found = OutOfMemory(f"rank {rank}: out of memory, phase {phase}: {reason}")
            found.advice = (*self._advice(phase),)
            if train.memory_snapshot:
                path = Path(train.output_dir or "", f"memory-{rank}.pickle")
                write_history(path)
                found.advice += (f"  {path}: drag it to https://pytorch.org/memory_viz",)
            raise found from error

    def _advice(self, phase: str) -> Iterator[str]:
        needs, limit = self.asked.budget, self.limit / GIB
        there = needs.phases.get(phase)
        said = f"{there / GIB:.4g} GiB of tensors in this phase, " if there else ""
        yield f"  the plan said {said}{needs.total / GIB:.4g} GiB at the fullest, of {limit:.4g}"
        changes = advice(self.asked, self.files, phase, self.limit)
        for number, change in enumerate(changes, 1):
            yield f"  {number}. {change}"
        if not changes:
            yield "  no setting would save anything there: is something else using this memory?"

    def closing(self, ranks: Sequence[Mapping[str, float]]) -> str:
        """One line at the end: predicted beside measured. ranks: what each of them read, in GiB."""
        needs, peaks = self.asked.budget, {k: max(r[k] for r in ranks) for k in ranks[0]}
        said = f"memory at the fullest: predicted {needs.tensors / GIB:.4g} GiB of tensors"
        if not self.asked.setup.on_gpu:
            return (
                f"{said}, not measured: on a CPU only whole processes are, of up to "
                f"{peaks['rss_peak_gib']:.4g} GiB with Python and its libraries"
            )
        measured, reserved, used = (peaks[f"gpu_memory_{name}_gib"] for name in
                                    ("allocated", "reserved", "used"))  # fmt: skip
        return (
            f"{said}, measured {measured:.4g} on the fullest GPU; with context and slack predicted "
            f"{needs.total / GIB:.4g}, in use {used:.4g} (reserved by torch {reserved:.4g})"
        )


def foresee(
    world: World,
    asked: tuple[Way, Mapping[str, Zero]],
    lora: LoraShape,
    schedule: Schedule,
    keeps_what_fits: bool,
) -> Forecast:
    """The plan with the lengths of the data, and what the fullest device has free. Collective.

    asked: what the settings ask for, and the files that could serve; keeps_what_fits: then as many
    blocks keep their activations as fit with some room to spare.
    """
    (option, files), on_gpu = asked, world.device.type == "cuda"
    setup = replace(
        option.setup,
        adapter=lora,
        step_tokens=most_tokens(schedule, world.size),
        longest=int(schedule.lengths.max()),
        on_gpu=on_gpu,
    )
    free = min(world.gather_objects(free_memory(world.device, world.size)))
    if keeps_what_fits:
        setup = keep_most_blocks(setup, free)
    return Forecast(Way(option.file, setup, budget(setup)), files, free)
