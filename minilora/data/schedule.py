"""The order in which epochs visit the documents, cut into optimizer steps."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from minilora.settings.settings import Settings

Int64s = NDArray[np.int64]


def permutation(count: int, *seed: int) -> Int64s:
    """The numbers below count in an order that the seed decides, the same for ever: int64.

    Raw bits and a stable sort: numpy promises (NEP 19) that these never change between its
    releases, and does not promise it for its own `permutation`.
    """
    source = np.random.Philox(np.random.SeedSequence(seed))
    return np.argsort(source.random_raw(count), kind="stable")


@dataclass(frozen=True)
class Schedule:
    """Which documents belong to which optimizer step: a pure function of the fields.

    lengths: (n,) int64, tokens per document. A step takes the next `rows_per_step` documents of the
    epoch's permutation; with packing as many as fit into rows_per_step * cutoff_len tokens, at
    least one. The last step of an epoch takes what is left. done_steps, done_rows: where a resumed
    run goes on, documents counted over all epochs. break_even_length: the document length at which
    attention costs as much as the matrix products (`LlamaShape.break_even_length`), by which a
    step's documents are shared out over the ranks. Raises ValueError without documents or with
    fewer than one row per step.
    """

    lengths: Int64s
    seed: int
    rows_per_step: int
    cutoff_len: int = 2048
    packing: bool = False
    num_train_epochs: float = 3.0
    max_steps: int = -1
    disable_shuffling: bool = False
    done_steps: int = 0
    done_rows: int = 0
    break_even_length: float = math.inf

    @classmethod
    def of(
        cls,
        lengths: Int64s,
        settings: Settings,
        ranks: int,
        break_even_length: float,
        done: tuple[int, int] = (0, 0),
    ) -> Schedule:
        """The schedule that the settings ask for on so many ranks, after (steps, rows) done."""
        train = settings.train
        per_rank = train.per_device_train_batch_size * train.gradient_accumulation_steps
        return cls(
            lengths,
            seed=train.seed,
            rows_per_step=ranks * per_rank,
            cutoff_len=settings.data.cutoff_len,
            packing=settings.packs,
            num_train_epochs=train.num_train_epochs,
            max_steps=train.max_steps,
            disable_shuffling=train.disable_shuffling,
            done_steps=done[0],
            done_rows=done[1],
            break_even_length=break_even_length,
        )

    def __post_init__(self) -> None:
        if len(self.lengths) == 0 or self.rows_per_step < 1:
            raise ValueError(
                f"a schedule wants documents and rows per step, got {len(self.lengths)} and "
                f"{self.rows_per_step}"
            )

    @cached_property
    def total_steps(self) -> int:
        """Optimizer steps of the run: max_steps if positive, else all epochs and a part of one."""
        if self.max_steps > 0:
            return self.max_steps
        whole = math.floor(self.num_train_epochs)
        total = self._start_of(whole)
        if whole < self._first_epoch or whole == self.num_train_epochs:
            return total
        # Rounded, since 0.1 of 10 steps is one step though 1.1 - 1 is a little more than 0.1.
        part = round((self.num_train_epochs - whole) * self.steps_per_epoch(whole), 6)
        return total + max(0, math.ceil(part) - self._skipped(whole))

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of this epoch; with packing it depends on the epoch's order."""
        if not self.packing:
            return math.ceil(len(self.lengths) / self.rows_per_step)
        return self._steps_of(epoch)[1]

    def rows(self, step: int) -> Int64s:
        """Document ids of this global optimizer step (from 0), in the epoch's order: int64."""
        epoch, index = self._place(step)
        return self._steps_of(epoch)[0][index]

    def epoch(self, step: int) -> float:
        """Epochs done after this step (from 0), with the fraction of the current one."""
        epoch, index = self._place(step)
        return epoch + (self._skipped(epoch) + index + 1) / self.steps_per_epoch(epoch)

    @property
    def _first_epoch(self) -> int:
        """The epoch in which the next document lies."""
        return self.done_rows // len(self.lengths)

    def _skipped(self, epoch: int) -> int:
        """Steps of this epoch that were done before."""
        if epoch > self._first_epoch:
            return 0
        steps, whole = self._steps_of(epoch)
        return whole - len(steps)

    def _place(self, step: int) -> tuple[int, int]:
        """Epoch of a step not done yet, and the step's index among those left of it."""
        assert step >= self.done_steps, f"step {step} of {self.done_steps} done ones"
        while self._starts[-1] <= step:
            self._start_of(self._first_epoch + len(self._starts))
        index = bisect_right(self._starts, step) - 1
        return self._first_epoch + index, step - self._starts[index]

    def _start_of(self, epoch: int) -> int:
        """The first step not done yet of an epoch, or of the first epoch that is not done."""
        while len(self._starts) <= epoch - self._first_epoch:
            latest = self._first_epoch + len(self._starts) - 1
            left = self.steps_per_epoch(latest) - self._skipped(latest)
            self._starts.append(self._starts[-1] + left)
        return self._starts[max(0, epoch - self._first_epoch)]

    @cached_property
    def _starts(self) -> list[int]:
        """What `_start_of` has found so far, from the first epoch that is not done."""
        return [self.done_steps]

    @cached_property
    def _latest(self) -> dict[int, tuple[list[Int64s], int]]:
        """What `_steps_of` has found for the latest epoch that it was asked for."""
        return {}

    def _steps_of(self, epoch: int) -> tuple[list[Int64s], int]:
        """What is left of an epoch, cut into steps, and how many steps the whole of it has."""
        if epoch not in self._latest:
            count = len(self.lengths)
            order = (
                np.arange(count) if self.disable_shuffling else permutation(count, self.seed, epoch)
            )
            whole = len(self._cuts(order)) + 1
            if epoch == self._first_epoch:
                order = order[self.done_rows % count :]
            self._latest.clear()
            self._latest[epoch] = np.split(order, self._cuts(order)), whole
        return self._latest[epoch]

    def _cuts(self, order: Int64s) -> list[int]:
        """Positions in the epoch's order at which a new step begins."""
        if not self.packing:
            return list(range(self.rows_per_step, len(order), self.rows_per_step))
        room = self.rows_per_step * self.cutoff_len
        running = np.cumsum(self.lengths[order])
        cuts: list[int] = []
        start = used = 0
        while True:
            end = max(int(np.searchsorted(running, used + room, side="right")), start + 1)
            if end >= len(order):
                return cuts
            cuts.append(end)
            start, used = end, int(running[end - 1])
