"""Reading base weights: exact pieces, little memory, and every broken file refused by name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.files.model_config import read_model_config
from minilora.files.tensor_parts import TensorPart
from minilora.files.weights import INDEX, read_checkpoint, read_parts
from minilora.settings.errors import RequestError
from tests.support.broken_weights import (
    BROKEN,
    NORM,
    edit_index,
    replace_tensor,
    shard_of,
    truncate,
)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may break."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_any_piece_of_any_tensor_is_exact(tiny: Path) -> None:
    checkpoint = read_checkpoint(read_model_config(tiny))
    generator = torch.Generator().manual_seed(0)
    for name, stored in checkpoint.tensors.items():
        whole = load_file(stored.file)[name].view(-1)
        start, stop = sorted(torch.randint(0, len(whole) + 1, (2,), generator=generator).tolist())
        destination = torch.full((stop - start,), -7.0)
        count = read_parts(checkpoint, [TensorPart(name, start, destination)])
        assert torch.equal(destination, whole[start:stop])
        assert count == (stop - start) * 4


def test_pieces_are_converted_to_the_dtype_of_their_destination(tiny: Path) -> None:
    checkpoint = read_checkpoint(read_model_config(tiny))
    name = "model.norm.weight"
    destination = torch.empty(32, dtype=torch.bfloat16)
    read_parts(checkpoint, [TensorPart(name, 0, destination)])
    assert torch.equal(destination, load_file(checkpoint.tensors[name].file)[name].bfloat16())


def test_a_single_file_without_an_index_is_read(tiny: Path, copy: Path) -> None:
    tensors = {}
    for file in copy.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (copy / INDEX).unlink()
    save_file(tensors, copy / "model.safetensors")
    assert (
        read_checkpoint(read_model_config(copy)).total_bytes
        == read_checkpoint(read_model_config(tiny)).total_bytes
    )


def test_reading_needs_no_more_memory_than_the_part(tmp_path: Path) -> None:
    """A process that reads a seventh of a 210 MB tensor grows by that seventh, 30 MB."""
    script = f"""
import json, resource, torch
from pathlib import Path
from safetensors.torch import save_file
from minilora.files.tensor_parts import TensorPart
from minilora.files.weights import Checkpoint, StoredTensor, read_parts
path = Path({str(tmp_path)!r}) / "big.safetensors"
stored = StoredTensor(path, 8 + int.from_bytes(path.open("rb").read(8), "little"),
                      (7500, 7000), torch.float32)
part = torch.zeros(7500 * 1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checkpoint = Checkpoint(path.parent, None, {{"big": stored}})
read_parts(checkpoint, [TensorPart("big", 7500 * 1000, part)])
assert part[0] == 7500 * 1000 and part[-1] == 2 * 7500 * 1000 - 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    # Up to 2**24 fp32 counts without a gap; the part read lies below that.
    save_file(
        {"big": torch.arange(7500 * 7000).float().view(7500, 7000)}, tmp_path / "big.safetensors"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout) * 1024
    assert grown < 1.3 * 7500 * 1000 * 4, f"{grown / 1e6} MB"


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_a_broken_checkpoint_is_refused_by_name(copy: Path, case: str) -> None:
    change, words = BROKEN[case]
    change(copy)
    with pytest.raises(RequestError) as refused:
        read_checkpoint(read_model_config(copy))
    for word in words:
        assert word in str(refused.value)
    assert str(copy) in str(refused.value)


def test_all_broken_files_are_named_at_once(copy: Path) -> None:
    truncate(copy)
    shard_of(copy, "model.embed_tokens.weight").unlink()
    with pytest.raises(RequestError) as refused:
        read_checkpoint(read_model_config(copy))
    assert len(refused.value.problems) >= 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(copy: Path, bad: float) -> None:
    norm = torch.ones(32)
    norm[5] = bad
    replace_tensor(NORM, norm)(copy)
    checkpoint = read_checkpoint(read_model_config(copy))
    with pytest.raises(RequestError, match=f"{NORM} holds NaN or infinite"):
        read_parts(checkpoint, [TensorPart(NORM, 0, torch.empty(32))])


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
    }
    save_file({**tensors, **extra}, file)
    edit_index(lambda index: index.update(dict.fromkeys(extra, file.name)))(folder)
    assert "lm_head.weight" not in read_checkpoint(read_model_config(folder)).tensors
