"""Which snapshots are deleted."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer_utils import rotate_checkpoints

from minilora.files.snapshot import (
    DRAFT,
    PREFIX,
    prune,
)


def test_leftovers_of_an_earlier_run_go_first(tmp_path: Path) -> None:
    for step in (2, 4, 900):
        (tmp_path / f"{PREFIX}{step}").mkdir()
    (tmp_path / f"{PREFIX}6{DRAFT}").mkdir()
    prune(tmp_path, 2, tmp_path / f"{PREFIX}4")
    assert {path.name for path in tmp_path.iterdir()} == {f"{PREFIX}2", f"{PREFIX}4"}


def test_what_is_pruned_is_what_the_trainer_prunes(tmp_path: Path) -> None:
    for keep in (None, 1, 2, 3):
        for best in (None, 2, 4, 8):
            kept = []
            for place in ("ours", "theirs"):
                folder = tmp_path / f"{keep}-{best}-{place}"
                for step in (2, 4, 6, 8):
                    (folder / f"checkpoint-{step}").mkdir(parents=True)
                found = None if best is None else folder / f"checkpoint-{best}"
                if place == "ours":
                    prune(folder, keep, folder / "checkpoint-8", found)
                else:
                    rotate_checkpoints(str(folder), keep, found and str(found))
                kept.append({path.name for path in folder.iterdir()})
            assert kept[0] == kept[1], (keep, best)
