"""The order in which epochs visit the documents, cut into optimizer steps.

Shape letters: n documents.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from minilora.data.documents import Int64s
from minilora.settings.settings import Settings


def permutation(count: int, *seed: int) -> Int64s:
    """The numbers below count in an order that the seed decides, the same for ever: int64.

    It sorts raw random bits with a stable sort, because numpy promises (NEP 19) that the bits
    never change from release to release. For its own `permutation` it does not promise that.
    """
    source = np.random.Philox(np.random.SeedSequence(seed))
    return np.argsort(source.random_raw(count), kind="stable")


@dataclass(frozen=True)
class Epoch:
    """What is left to do of one epoch.

    steps: document ids of each step left, int64. done: steps of this epoch that an earlier run did.
    """

    steps: list[Int64s]
    done: int


@dataclass(frozen=True)
class Schedule:
    """Which documents belong to which optimizer step: a pure function of the fields.

    A step takes the next `rows_per_step` documents of the epoch's permutation. With packing it
    takes as many as fit into rows_per_step * cutoff_len tokens, and at least one. The last step of
    an epoch takes what is left.

    lengths: (n,) int64, tokens per document.
    done_steps, done_rows: what an earlier run did of this one, in steps and in documents counted
        over all epochs. A resumed run goes on with the next document, whatever its rows_per_step.
    break_even_length: the document length at which attention costs as much as the matrix products
        (`LlamaShape.break_even_length`). `build_step` deals out documents to the ranks by it.

    Raises ValueError without documents or with fewer than one row per step.
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
                f"a schedule needs documents and rows per step, got {len(self.lengths)} and "
                f"{self.rows_per_step}"
            )

    @cached_property
    def total_steps(self) -> int:
        """Optimizer steps of the run: max_steps if positive, else all epochs and a part of one."""
        if self.max_steps > 0:
            return self.max_steps
        whole_epochs = math.floor(self.num_train_epochs)
        total = self._first_step_of(whole_epochs)
        if whole_epochs < self._first_epoch or whole_epochs == self.num_train_epochs:
            return total

        # Rounded, since 0.1 of 10 steps is one step though 1.1 - 1 is a little more than 0.1.
        fraction = self.num_train_epochs - whole_epochs
        steps = math.ceil(round(fraction * self.steps_per_epoch(whole_epochs), 6))
        return total + max(0, steps - self._done_of(whole_epochs))

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of this epoch; with packing it depends on the epoch's order."""
        if not self.packing:
            return math.ceil(len(self.lengths) / self.rows_per_step)
        found = self._epoch(epoch)
        return found.done + len(found.steps)

    def document_ids(self, step: int) -> Int64s:
        """Document ids of this global optimizer step (from 0), in the epoch's order: int64."""
        epoch, index = self._place(step)
        return self._epoch(epoch).steps[index]

    def epoch(self, step: int) -> float:
        """Epochs done after this step (from 0), with the fraction of the current one."""
        epoch, index = self._place(step)
        return epoch + (self._done_of(epoch) + index + 1) / self.steps_per_epoch(epoch)

    @property
    def _first_epoch(self) -> int:
        """The epoch in which the next document lies."""
        return self.done_rows // len(self.lengths)

    def _done_of(self, epoch: int) -> int:
        """Steps of this epoch that an earlier run did."""
        # Only the first epoch can have any; so the others need not be shuffled to be counted.
        return self._epoch(epoch).done if epoch <= self._first_epoch else 0

    def _place(self, step: int) -> tuple[int, int]:
        """The epoch of a step that is not done yet, and its index in `Epoch.steps`."""
        assert step >= self.done_steps, f"step {step} is one of the {self.done_steps} done ones"
        while self._first_steps[-1] <= step:
            self._first_step_of(self._first_epoch + len(self._first_steps))
        index = bisect_right(self._first_steps, step) - 1
        return self._first_epoch + index, step - self._first_steps[index]

    def _first_step_of(self, epoch: int) -> int:
        """The first step of an epoch that is not done yet; `done_steps` for an epoch that is."""
        while len(self._first_steps) <= epoch - self._first_epoch:
            latest = self._first_epoch + len(self._first_steps) - 1
            left = self.steps_per_epoch(latest) - self._done_of(latest)
            self._first_steps.append(self._first_steps[-1] + left)
        return self._first_steps[max(0, epoch - self._first_epoch)]

    @cached_property
    def _first_steps(self) -> list[int]:
        """What `_first_step_of` has found so far; the first entry is for `_first_epoch`."""
        return [self.done_steps]

    @cached_property
    def _latest(self) -> dict[int, Epoch]:
        """The epoch that `_epoch` was asked for last, by its number."""
        return {}

    def _epoch(self, epoch: int) -> Epoch:
        """What is left of an epoch, cut into steps."""
        if epoch in self._latest:
            return self._latest[epoch]
        count = len(self.lengths)
        order: Int64s = np.arange(count)
        if not self.disable_shuffling:
            order = permutation(count, self.seed, epoch)

        # A resumed run may have other steps than the one before it: what is left is cut anew, and
        # what was done counts as the steps that the whole epoch has more than this.
        whole = len(self._cuts(order)) + 1
        if epoch == self._first_epoch:
            order = order[self.done_rows % count :]
        steps = np.split(order, self._cuts(order))

        # Only one epoch is kept: the order of millions of documents is large, and steps are asked
        # for one after another.
        self._latest.clear()
        self._latest[epoch] = Epoch(steps, done=whole - len(steps))
        return self._latest[epoch]

    def _cuts(self, order: Int64s) -> list[int]:
        """Positions in the epoch's order at which a new step begins."""
        if not self.packing:
            return list(range(self.rows_per_step, len(order), self.rows_per_step))

        room = self.rows_per_step * self.cutoff_len
        running = np.cumsum(self.lengths[order])
        cuts: list[int] = []
        start = used = 0  # where the current step begins, and the tokens before it
        while True:
            fits_until = int(np.searchsorted(running, used + room, side="right"))
            end = max(fits_until, start + 1)  # a document longer than the room is a step by itself
            if end >= len(order):
                return cuts
            cuts.append(end)
            start, used = end, int(running[end - 1])
