"""What a run shows and leaves: progress bar, trainer_log.jsonl, train_results.json and a picture.

The files have LLaMA-Factory's names and keys. Only the time fields depend on the clock.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minilora.files.adapter import write_atomically
from minilora.report.curves import LOG, PICTURE, draw_loss, read_log
from minilora.settings.keys import steps_of
from minilora.settings.settings import TrainSettings
from minilora.settings.terminal import progress_bar

RESULTS = "train_results.json"


@dataclass(frozen=True)
class StepRecord:
    """One finished optimizer step of the whole run, all ranks together.

    step: counted from 1; epoch: passes over the data after this step
    loss: mean over the step's labelled tokens; labelled, tokens, documents: how many it had
    seconds: what it took, without the validations and snapshots between steps
    memory: figures in GiB, for each the value of every rank; the figure that tells most comes first
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    labelled: int
    tokens: int
    documents: int
    seconds: float
    memory: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)


@dataclass
class Totals:
    """Sums since step 0, and since the last log line, which is what `window` means.

    Snapshots keep them, so that the log of a resumed run continues exactly.
    """

    step: int = 0
    epoch: float = 0.0
    loss_sum: float = 0.0
    labelled: int = 0
    tokens: int = 0
    documents: int = 0
    window_loss_sum: float = 0.0
    window_labelled: int = 0

    def add(self, record: StepRecord) -> None:
        """Count one step."""
        self.step = record.step
        self.epoch = record.epoch
        self.loss_sum += record.loss * record.labelled
        self.labelled += record.labelled
        self.tokens += record.tokens
        self.documents += record.documents
        self.window_loss_sum += record.loss * record.labelled
        self.window_labelled += record.labelled

    def close_window(self) -> float:
        """The mean loss since the last log line; the next window starts."""
        loss = self.window_loss_sum / max(self.window_labelled, 1)
        self.window_loss_sum = 0.0
        self.window_labelled = 0
        return loss


class Report:
    """Progress and log of one run, made on every rank; only the active one (rank 0) acts.

    resumed: the Totals of the snapshot that the run continues; log lines after it are dropped.
    """

    def __init__(
        self,
        train: TrainSettings,
        total_steps: int,
        active: bool,
        resumed: Totals | None = None,
    ) -> None:
        assert train.output_dir is not None
        self.totals = dataclasses.replace(resumed) if resumed else Totals()
        self._train = train
        self._total_steps = total_steps
        self._active = active
        self._folder = Path(train.output_dir)

        # Speeds are those of this run alone, without the steps before the snapshot.
        self._started_with = dataclasses.replace(self.totals)
        self._start = time.monotonic()
        self._window_tokens = 0
        self._window_seconds = 0.0
        self._peak_memory: dict[str, float] = {}
        self._warned = False

        self._bar = progress_bar(
            total_steps,
            "step",
            initial=self.totals.step,
            disable=not active,
            dynamic_ncols=True,
        )
        if active:
            self._folder.mkdir(parents=True, exist_ok=True)
            _cut_log(self._folder / LOG, self.totals.step)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def message(self, text: str) -> None:
        """Print a line on stderr above the bar."""
        if self._active:
            tqdm.write(text, file=sys.stderr)

    def warn(self, warnings: Sequence[str]) -> None:
        """Print the first warning that ever comes; the same thing goes wrong at each snapshot."""
        if warnings and not self._warned:
            self._warned = True
            self.message(f"warning: {warnings[0]}")

    def step(self, record: StepRecord) -> None:
        """Count a step, move the bar, and write a log line when one is due.

        Raises OSError when the log cannot be written.
        """
        if not self._active:
            return

        self.totals.add(record)
        self._window_tokens += record.tokens
        self._window_seconds += record.seconds
        for name, values in record.memory.items():
            self._peak_memory[name] = max(*values, self._peak_memory.get(name, 0.0))

        shown = [
            f"loss {record.loss:.4f}",
            f"{_rate(record.tokens, record.seconds):,.0f} tok/s",
        ]
        if record.memory:
            first_figure = next(iter(record.memory.values()))
            shown.append(f"{max(first_figure):.1f} GiB")
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update()

        if self.writes_at(record.step):
            self._write_line_of_steps(record)

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Write a log line of the validation after a step. Raises OSError."""
        self._write_line(
            {
                "current_steps": step,
                "total_steps": self._total_steps,
                **scores,
                "epoch": self.totals.epoch,
            }
        )
        shown = ", ".join(f"{key} {value:.4f}" for key, value in scores.items())
        self.message(f"step {step}: {shown}")

    def writes_at(self, step: int) -> bool:
        """Whether a log line is due after this step."""
        every = steps_of(self._train.logging_steps, self._total_steps)
        return step % every == 0 or step == self._total_steps

    def finish(self, **more: float) -> None:
        """Close the bar; write train_results.json, with more in it, and draw training_loss.png.

        What cannot be written costs a warning: the adapter is whole by now.
        """
        self._bar.close()
        if not self._active:
            return

        runtime = time.monotonic() - self._start
        before = self._started_with
        totals = self.totals
        results = {
            "epoch": totals.epoch,
            "train_loss": totals.loss_sum / max(totals.labelled, 1),
            "train_runtime": runtime,
            "train_samples_per_second": _rate(totals.documents - before.documents, runtime),
            "train_steps_per_second": _rate(totals.step - before.step, runtime),
            "total_tokens": totals.tokens,
            **more,
            **self._peak_memory,
        }
        # A run that found nothing left to train knows less than the file that is there.
        path = self._folder / RESULTS
        if totals.step > before.step or not path.exists():
            self._write_results(path, results)

        if self._train.plot_loss:
            try:
                draw_loss(self._folder)
            except ImportError:
                self.message(f"{PICTURE} is not drawn: pip install matplotlib")
            except OSError as error:  # the run is done, and its curves are in the log
                self.message(f"warning: {PICTURE} is not drawn: {error.strerror}")

    def _write_results(self, path: Path, results: Mapping[str, float]) -> None:
        try:
            write_atomically(path, (json.dumps(results, indent=4) + "\n").encode())
        except OSError as error:
            self.message(f"warning: {path} is not written: {error.strerror}")
            # Results of an earlier run must not pass for those of this one.
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _write_line_of_steps(self, record: StepRecord) -> None:
        """Write a log line of the steps since the last one, of which `record` is the last."""
        elapsed = time.monotonic() - self._start
        per_step = elapsed / (record.step - self._started_with.step)

        self._write_line(
            {
                "current_steps": record.step,
                "total_steps": self._total_steps,
                "loss": self.totals.close_window(),
                "grad_norm": record.grad_norm,
                "lr": record.learning_rate,
                "epoch": record.epoch,
                "percentage": 100 * record.step / self._total_steps,
                "elapsed_time": _clock(elapsed),
                "remaining_time": _clock(per_step * (self._total_steps - record.step)),
                "throughput": _rate(self._window_tokens, self._window_seconds),
                "total_tokens": self.totals.tokens,
                **record.memory,
            }
        )

        self._window_tokens = 0
        self._window_seconds = 0.0

    def _write_line(self, line: Mapping[str, Any]) -> None:
        # Opened for each line, so that a disk that fills up is noticed at the line that it loses.
        with (self._folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _cut_log(path: Path, last_step: int) -> None:
    """Drop the lines of steps that the run repeats."""
    if path.exists():
        lines = [line for line in read_log(path) if line["current_steps"] <= last_step]
        # A run that is killed here must leave the old log or the new one, never half of it.
        draft = path.with_suffix(".tmp")
        draft.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(draft, path)


def _rate(count: int, seconds: float) -> float:
    """Count per second, for no time at all too."""
    return count / max(seconds, 1e-9)


def _clock(seconds: float) -> str:
    """Whole seconds as H:MM:SS."""
    return str(datetime.timedelta(seconds=int(seconds)))
