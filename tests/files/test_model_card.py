"""The model card: the hub reads it, it has the licence of the base, and no user loses his own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from minilora.files.model_card import CARD, adapter_card, base_name, licence_of, write_card
from tests.support.merging import PLAIN, make, merge

LICENCE = "---\nlicense: llama3.1\nlicense_link: LICENSE\nlanguage: [en]\n---\n# Base\n"


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny, tmp_path / "Tiny-Llama"))
    (folder / CARD).write_text(LICENCE, encoding="utf-8")
    return folder


def card_of(base: Path, **given: Any) -> str:
    return adapter_card(base, ("data/rows.jsonl", "identity"), given, {"train_loss": 0.25})


def test_the_hub_reads_the_card_of_an_adapter(base: Path) -> None:
    card = ModelCard(card_of(base, learning_rate=2e-4, output_dir="/home/me", template=None))
    assert card.data.base_model == "Tiny-Llama" and card.data.library_name == "peft"
    assert card.data.tags == ["base_model:adapter:Tiny-Llama", "lora", "minilora"]
    assert card.data.license == "llama3.1" and card.data.license_link == "LICENSE"
    assert card.data.pipeline_tag == "text-generation"
    for words in (
        "- rows.jsonl\n- identity",
        "| learning_rate | 0.0002 |",
        "| train_loss | 0.25 |",
    ):
        assert words in card.text
    assert "/home/me" not in card.text, "a path of this machine"


def test_a_cell_ends_neither_the_row_nor_the_table(base: Path) -> None:
    text = card_of(base, default_system="Be brief.\n| --- |", lora_target=["q_proj"])
    assert '| default_system | Be brief. \\| --- \\| |\n| lora_target | ["q_proj"] |' in text


@pytest.mark.parametrize("adapter_only", [False, True])
def test_what_is_merged_gets_a_card_of_its_own(
    base: Path, tmp_path: Path, adapter_only: bool
) -> None:
    """The base's card has the base's figures; only its licence goes on."""
    adapter = make(base, tmp_path / "style", **PLAIN)
    words = ["--adapter_only"] if adapter_only else []
    assert merge(base, adapter, tmp_path / "out", *words) == 0
    card = ModelCard.load(tmp_path / "out" / CARD)
    assert card.data.library_name == ("peft" if adapter_only else "transformers")
    assert card.data.base_model == "Tiny-Llama" and card.data.license == "llama3.1"
    assert "| style | 1.0 |" in card.text and "# Base" not in card.text


def test_a_users_own_card_stays_and_ours_is_written_anew(base: Path, tmp_path: Path) -> None:
    write_card(tmp_path, card_of(base, seed=1))
    write_card(tmp_path, card_of(base, seed=2))
    assert "| seed | 2 |" in (tmp_path / CARD).read_text(encoding="utf-8")
    for own in (b"# Mine\n", b"\xff\xfe"):
        (tmp_path / CARD).write_bytes(own)
        write_card(tmp_path, card_of(base))
        assert (tmp_path / CARD).read_bytes() == own


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "no front",
        "---\n- a\n---\n",
        "---\n: [\n---\n",
        "---\nlicense: [a]\n---\n",
        "---\n" + "[" * 9999 + "\n---\n",
    ],
)
def test_a_base_without_a_licence_that_can_be_read_gives_none(
    tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / CARD).write_text(text, encoding="utf-8")
    assert licence_of(tmp_path) == {}
    assert ModelCard(card_of(tmp_path)).data.license is None


def test_the_hubs_cache_tells_the_name_of_the_base(tmp_path: Path) -> None:
    folder = tmp_path / "models--meta-llama--Llama-3.1-8B" / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    assert base_name(folder) == "meta-llama/Llama-3.1-8B"
