"""From settings to documents: what is read, how often, and what is told."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from minilora.data.prepare import Prepared
from minilora.settings.command_line import read_settings
from tests.support.prepared import prepared_of
from tests.support.runs import write_rows

ROWS = 40


@pytest.fixture(scope="module")
def given(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("prepare")
    write_rows(folder / "rows.jsonl", ROWS)
    return {"model_name_or_path": tiny, "dataset": folder / "rows.jsonl", "disable_shuffling": True}


def prepared(given: dict[str, Any], **more: Any) -> Prepared:
    asked = {**given, **more}
    return prepared_of(read_settings([f"--{key}={asked[key]}" for key in asked], "preview"))


def test_a_share_is_held_out_rounded_up_and_the_seed_draws_it(given: dict[str, Any]) -> None:
    """As sklearn and datasets count: 0.11 of 40 rows are 5."""
    held = []
    for size, seed in ((0.11, 1), (5, 1), (5, 2)):
        found = prepared(given, val_size=size, seed=seed, eval_strategy="epoch")
        assert (len(found.validation), len(found.documents)) == (5, 35)
        held.append(found.validation.tokens.tolist())
    assert held[0] == held[1] != held[2]


def test_what_is_held_out_and_what_is_trained_on_are_all_rows_in_their_order(
    given: dict[str, Any],
) -> None:
    every = prepared(given).documents
    rows = [every[index][0].tolist() for index in range(ROWS)]
    found = prepared(given, val_size=9, eval_strategy="epoch")
    parts = [
        [rows.index(part[index][0].tolist()) for index in range(len(part))]
        for part in (found.documents, found.validation)
    ]
    assert sorted(parts[0] + parts[1]) == list(range(ROWS))
    assert all(part == sorted(part) for part in parts)
    assert found.sample.startswith("<|begin_of_text|>") and "[[" in found.sample


def test_the_summary_has_the_numbers_of_the_documents(given: dict[str, Any]) -> None:
    found = prepared(given, eval_dataset=given["dataset"], eval_strategy="epoch", cutoff_len=90)
    tokens, trained = len(found.documents.tokens), int(found.documents.labelled.sum())
    first_line, *notes = found.summary.splitlines()
    assert len(notes) == 1 and "rows hold the text of special tokens (<|eot_id|>)" in notes[0]
    used, *rest = first_line.split("; ")
    assert used == "40 rows used, 0 dropped"
    assert f"40 documents, {tokens:,} tokens, {trained:,} of them trained" in rest
    assert "40 documents to validate with (40 rows used, 0 dropped" in rest
    cut = [part for part in rest if " cut, by " in part]
    assert len(cut) == 2 and cut[1] == f"{cut[0]})"


def test_each_file_of_the_checkpoint_is_opened_once(
    given: dict[str, Any], tmp_path: Path, tiny: Path
) -> None:
    """What reads the files once more would open one of them twice."""
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    template = json.loads((model / "tokenizer_config.json").read_text())["chat_template"]
    (model / "chat_template.jinja").write_text(template)
    settings = read_settings(
        [f"--{key}={value}" for key, value in {**given, "model_name_or_path": model}.items()]
        + [f"--eval_dataset={given['dataset']}", "--eval_strategy=epoch"],
        "preview",
    )
    opened: Counter[str] = Counter()
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and Path(str(arguments[0])).parent == model:
            opened[Path(str(arguments[0])).name] += 1

    sys.addaudithook(watch)  # it cannot be removed, so it is switched off
    try:
        prepared_of(settings)
    finally:
        watching = False
    assert opened == {
        "config.json": 1,
        "tokenizer.json": 1,
        "tokenizer_config.json": 1,
        "special_tokens_map.json": 1,
        "generation_config.json": 1,
        "chat_template.jinja": 1,
    }
