"""A head that config.json ties to the embedding, and that the files hold all the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.files.model_config import read_model_config
from minilora.files.weights import check_tied_head, read_checkpoint
from minilora.generate import main as generate
from minilora.merge import main as merge
from minilora.settings.errors import RequestError
from tests.support.broken_weights import (
    edit_index,
    shard_of,
)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may break."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_a_tied_head_written_out_and_old_frequencies_are_no_surplus(
    tiny_tied: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_tied, tmp_path / "model"))
    embedding = "model.embed_tokens.weight"
    file = shard_of(folder, embedding)
    tensors = load_file(file)
    extra = {
        "lm_head.weight": tensors[embedding].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file({**tensors, **extra}, file)
    edit_index(lambda index: index.update(dict.fromkeys(extra, file.name)))(folder)
    checkpoint = read_checkpoint(read_model_config(folder))
    assert "lm_head.weight" not in checkpoint.tensors
    check_tied_head(checkpoint)


@pytest.mark.parametrize("place", [0, -1])
def test_a_tied_head_that_differs_is_refused(
    tiny_tied: Path, tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of the two is right only its user knows; the embedding was taken in silence."""
    folder = Path(shutil.copytree(tiny_tied, tmp_path / "model"))
    embedding = "model.embed_tokens.weight"
    file = shard_of(folder, embedding)
    tensors = load_file(file)
    head = tensors[embedding].clone()
    head[place, place] += 1
    save_file({**tensors, "lm_head.weight": head}, file)
    edit_index(lambda index: index.update({"lm_head.weight": file.name}))(folder)

    monkeypatch.setattr("minilora.files.weights.COMPARED", 1000)  # in several parts
    with pytest.raises(RequestError, match="lm_head.weight differs from .*tie_word_embeddings"):
        check_tied_head(read_checkpoint(read_model_config(folder)))
    words = ["--model_name_or_path", str(folder)]
    assert generate([*words, "--prompt", "x"]) == 2
    adapter = ["--adapter_name_or_path", "none", "--export_dir", str(tmp_path / "out")]
    assert merge([*words, *adapter]) == 2 and not (tmp_path / "out").exists()
