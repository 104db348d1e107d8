"""The order in which epochs visit the documents, cut into optimizer steps."""

import math
from bisect import bisect_left
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """Which documents belong to which optimizer step: a pure function of the fields.

    lengths: (n,) int64, tokens per document. A step takes the next `rows_per_step` documents of the
    epoch's permutation; with packing as many as fit into rows_per_step * cutoff_len tokens, at
    least one. The last step of an epoch takes what is left. Raises ValueError without documents or
    with fewer than one row per step.
    """

    lengths: Int64s
    seed: int
    rows_per_step: int
    cutoff_len: int = 2048
    packing: bool = False
    num_train_epochs: float = 3.0
    max_steps: int = -1
    disable_shuffling: bool = False
    _ends: list[int] = field(default_factory=lambda: [0], init=False, repr=False, compare=False)
    _latest: dict[int, list[Int64s]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if len(self.lengths) == 0 or self.rows_per_step < 1:
            raise ValueError(
                f"a schedule wants documents and rows per step, got {len(self.lengths)} and "
                f"{self.rows_per_step}"
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run: max_steps if positive, else all epochs and a part of one."""
        if self.max_steps > 0:
            return self.max_steps
        whole = math.floor(self.num_train_epochs)
        part = self.num_train_epochs - whole
        # Rounded, since 0.1 of 10 steps is one step though 1.1 - 1 is a little more than 0.1.
        extra = math.ceil(round(part * self.steps_per_epoch(whole), 6)) if part else 0
        return self._steps_before(whole) + extra

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of this epoch; with packing it depends on the epoch's order."""
        if not self.packing:
            return math.ceil(len(self.lengths) / self.rows_per_step)
        return self._steps_before(epoch + 1) - self._steps_before(epoch)

    def rows(self, step: int) -> Int64s:
        """Document ids of this global optimizer step (from 0), in the epoch's order: int64."""
        epoch, index = self._place(step)
        return self._steps_of(epoch)[index]

    def epoch(self, step: int) -> float:
        """Epochs done after this step (from 0), with the fraction of the current one."""
        epoch, index = self._place(step)
        return epoch + (index + 1) / self.steps_per_epoch(epoch)

    def _place(self, step: int) -> tuple[int, int]:
        """Epoch of a step, and the step's index in it."""
        if not self.packing:
            return divmod(step, self.steps_per_epoch(0))
        while self._ends[-1] <= step:
            self._steps_before(len(self._ends))
        epoch = bisect_left(self._ends, step + 1) - 1
        return epoch, step - self._ends[epoch]

    def _steps_before(self, epoch: int) -> int:
        """Steps of all epochs before this one."""
        if not self.packing:
            return epoch * self.steps_per_epoch(0)
        while len(self._ends) <= epoch:
            self._ends.append(self._ends[-1] + len(self._steps_of(len(self._ends) - 1)))
        return self._ends[epoch]

    def _steps_of(self, epoch: int) -> list[Int64s]:
        """The epoch's documents, cut into steps; only the latest epoch asked for is kept."""
        if epoch not in self._latest:
            order = self._order(epoch)
            self._latest.clear()
            self._latest[epoch] = np.split(order, self._cuts(order))
        return self._latest[epoch]

    def _order(self, epoch: int) -> Int64s:
        """A permutation of all documents."""
        count = len(self.lengths)
        if self.disable_shuffling:
            return np.arange(count)
        # Raw bits and a stable sort: numpy promises (NEP 19) that these never change between its
        # releases, and does not promise it for `permutation`.
        source = np.random.Philox(np.random.SeedSequence((self.seed, epoch)))
        return np.argsort(source.random_raw(count), kind="stable")

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
