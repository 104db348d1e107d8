"""The conversations of all datasets, and a tally of the rows that could not be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from minilora.data.conversations import BadRow, Conversation, Turn, to_turns
from minilora.data.schedule import permutation
from minilora.data.sources import (
    OPENAI_TAGS,
    OPTIONAL_COLUMNS,
    REQUIRED_COLUMNS,
    SHAREGPT_TAGS,
    UNREAD_COLUMNS,
    Row,
    Source,
    find_sources,
    read_rows,
)
from minilora.settings.errors import RequestError
from minilora.settings.settings import DataSettings

# Bad rows are reported and left out. A run stops if they are more than five, and more than 1 %.
TOLERATED_ROWS = 5
TOLERATED_SHARE = 0.01
PLACES_SHOWN = 3  # of the rows that were left out for one reason


@dataclass(frozen=True)
class Tally:
    """How many rows are used, and for each reason to drop rows, the places of those rows.

    cut: of the rows that are used but were too long, how many tokens each lost.
    notes: lines with what else is to be said of them.
    """

    kept: int
    dropped: Mapping[str, tuple[str, ...]]
    cut: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, kept: int, dropped: Iterable[tuple[str, str]], cut: Iterable[int] = ()) -> Tally:
        """Sort (reason, place) pairs by reason.

        Raises RequestError if no row is left, or more than 1 % (and more than five) are dropped.
        """
        places: dict[str, list[str]] = {}
        for reason, place in dropped:
            places.setdefault(reason, []).append(place)
        tally = cls(kept, {reason: tuple(found) for reason, found in places.items()}, tuple(cut))

        bad = tally.number_dropped
        if kept == 0:
            raise RequestError([f"no usable rows: {tally.summary()}"])
        if bad > max(TOLERATED_ROWS, TOLERATED_SHARE * (kept + bad)):
            raise RequestError([f"too many unusable rows (over 1 %): {tally.summary()}"])
        return tally

    def then(self, later: Tally) -> Tally:
        """This tally and that of a later stage, which got the rows kept here."""
        places = dict(self.dropped)
        for reason, more in later.dropped.items():
            places[reason] = places.get(reason, ()) + more
        return Tally(later.kept, places, later.cut, self.notes + later.notes)

    @property
    def number_dropped(self) -> int:
        """How many rows were dropped for all reasons together."""
        return sum(len(places) for places in self.dropped.values())

    def summary(self) -> str:
        """One line: rows used, rows dropped, and why, with the first places; rows cut."""
        parts = [f"{self.kept} rows used, {self.number_dropped} dropped"]
        for reason, places in self.dropped.items():
            shown = list(places[:PLACES_SHOWN])
            if len(places) > PLACES_SHOWN:
                shown.append("...")
            parts.append(f"{len(places)}: {reason} ({', '.join(shown)})")
        if self.cut:
            parts.append(f"{len(self.cut)} cut, by {sum(self.cut):,} tokens in all")
        return "; ".join(parts)


def read_conversations(
    names: Sequence[str], data: DataSettings, stage: str
) -> tuple[list[Conversation], Tally]:
    """All conversations of the named datasets, in order; for stage pt each is one `text` turn.

    Raises RequestError with every missing, broken or unsuitable file, or if too many rows are bad.
    """
    conversations: list[Conversation] = []
    dropped: list[tuple[str, str]] = []
    problems: list[str] = []
    for source in find_sources(tuple(names), Path(data.dataset_dir)):
        try:
            rows = _select(read_rows(source.path), source.num_samples, data.max_samples)
            convert = _converter(source, rows, stage)
        except RequestError as error:
            problems += error.problems
            continue
        for row in rows:
            try:
                conversations.append(Conversation(convert(row.value), row.place))
            except BadRow as error:
                dropped.append((str(error), row.place))

    # A broken file is told before the bad rows of other files, which may be its consequence.
    if problems:
        raise RequestError(problems)
    return conversations, Tally.of(len(conversations), dropped)


def _select(rows: list[Row], num_samples: int | None, max_samples: int | None) -> list[Row]:
    """The rows of a dataset that are used.

    num_samples: so many in a fixed random order, repeated if the file has fewer; None for all, as
    they are. max_samples: of those the first.
    """
    if num_samples is not None and rows:
        rows = [rows[index] for index in np.resize(permutation(len(rows), 0), num_samples)]
    return rows[:max_samples]


def _converter(source: Source, rows: list[Row], stage: str) -> Callable[[Any], tuple[Turn, ...]]:
    """The function from a row's value to turns, after a check that the file has its columns."""
    if not rows:
        raise RequestError([f"{source.path}: has no rows"])
    found = set(chain.from_iterable(row.value for row in rows if isinstance(row.value, dict)))
    formatting = _formatting(source, found, stage)

    if formatting != "text":
        _check_unread(source, rows)

    tags = OPENAI_TAGS if formatting == "openai" else SHAREGPT_TAGS
    return partial(
        to_turns,
        formatting=formatting,
        columns=_columns(source, formatting, found),
        tags={**tags, **source.tags},
    )


def _check_unread(source: Source, rows: list[Row]) -> None:
    """Raises RequestError if some row has tools or media, which would be left out of the prompt.

    An entry of dataset_info.json says which columns to read, and may leave these out. Of a file
    without an entry everything is meant to be read.
    """
    columns = {key: source.columns.get(key, "") for key in UNREAD_COLUMNS}
    if source.formatting is None:
        columns = {key: key for key in UNREAD_COLUMNS}
    remedies = {"tools": "write them into the system message, or remove the column"}

    problems = []
    for key, name in columns.items():
        given = (row.value.get(name) for row in rows if isinstance(row.value, dict))
        # LLaMA-Factory writes an empty list of tools as text.
        if any(value and value != "[]" for value in given):
            remedy = remedies.get(key, "only text can be trained; remove the column")
            problems.append(
                f"{source.path}: rows have {key}, which would be left out of the prompt; {remedy}"
            )
    if problems:
        raise RequestError(problems)


def _formatting(source: Source, found: set[str], stage: str) -> str:
    """The formatting of a source; for a bare file by the columns it has."""
    if stage == "pt":
        return "text"
    if source.path.suffix == ".txt":
        raise RequestError([f"{source.path}: plain text has no answers; it is for stage: pt"])
    if source.formatting is not None:
        return source.formatting
    for formatting, required in REQUIRED_COLUMNS.items():
        if formatting != "text" and found.issuperset(required.values()):
            return formatting

    problem = (
        f"{source.path}: has the columns {_listed(found)}; expected messages, or conversations,"
        " or instruction and output, or an entry in dataset_info.json"
    )
    if "text" in found:
        problem += "; text alone is for stage: pt"
    raise RequestError([problem])


def _columns(source: Source, formatting: str, found: set[str]) -> dict[str, str]:
    """The file's name of every column that is read.

    As in LLaMA-Factory an entry of dataset_info.json reads only the optional columns it names, or
    `input` if it names no columns at all; a bare file is read for all of them.
    """
    named = {key: name for key, name in source.columns.items() if key not in UNREAD_COLUMNS}
    if formatting == "text":
        named = {key: name for key, name in named.items() if key == "prompt"}
    columns = {**REQUIRED_COLUMNS[formatting], **named}

    missing = {name for name in columns.values() if name not in found}
    if missing:
        raise RequestError(
            [
                f"{source.path}: no column {_listed(missing)} among {_listed(found)}; say under"
                " columns in dataset_info.json what they are called"
            ]
        )

    if not source.columns:
        optional = OPTIONAL_COLUMNS if source.formatting is None else {"query": "input"}
        columns |= {key: name for key, name in optional.items() if name in found}
    return columns


def _listed(names: set[str]) -> str:
    """Names in their alphabetical order, for a message."""
    return ", ".join(sorted(names)) or "none"
