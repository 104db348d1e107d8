"""Reading base weights: exact pieces, little memory, and every broken file refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.config import RequestError
from minilora.files.weights import INDEX, Piece, read_checkpoint, read_pieces


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may break."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def shard_of(folder: Path, name: str) -> Path:
    weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    return folder / weight_map[name]


def test_any_piece_of_any_tensor_is_exact(tiny: Path) -> None:
    checkpoint = read_checkpoint(tiny)
    generator = torch.Generator().manual_seed(0)
    for name, stored in checkpoint.tensors.items():
        whole = load_file(stored.file)[name].view(-1)
        start, stop = sorted(torch.randint(0, len(whole) + 1, (2,), generator=generator).tolist())
        destination = torch.full((stop - start,), -7.0)
        count = read_pieces(checkpoint, [Piece(name, start, destination)])
        assert torch.equal(destination, whole[start:stop])
        assert count == (stop - start) * 4


def test_pieces_are_converted_to_the_dtype_of_their_destination(tiny: Path) -> None:
    checkpoint = read_checkpoint(tiny)
    name = "model.norm.weight"
    destination = torch.empty(32, dtype=torch.bfloat16)
    read_pieces(checkpoint, [Piece(name, 0, destination)])
    assert torch.equal(destination, load_file(checkpoint.tensors[name].file)[name].bfloat16())


def test_a_single_file_without_an_index_is_read(tiny: Path, copy: Path) -> None:
    tensors = {}
    for file in copy.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (copy / INDEX).unlink()
    save_file(tensors, copy / "model.safetensors")
    assert read_checkpoint(copy).total_bytes == read_checkpoint(tiny).total_bytes


def test_reading_needs_no_more_memory_than_the_part(tmp_path: Path) -> None:
    """A process that reads a seventh of a 210 MB tensor grows by that seventh, 30 MB."""
    script = f"""
import json, resource, torch
from pathlib import Path
from safetensors.torch import save_file
from minilora.files.weights import Checkpoint, Piece, StoredTensor, read_pieces
path = Path({str(tmp_path)!r}) / "big.safetensors"
stored = StoredTensor(path, 8 + int.from_bytes(path.open("rb").read(8), "little"),
                      (7500, 7000), torch.float32)
part = torch.zeros(7500 * 1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checkpoint = Checkpoint(path.parent, {{}}, None, {{"big": stored}})
read_pieces(checkpoint, [Piece("big", 7500 * 1000, part)])
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


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def edit_index(change: Callable[[dict[str, str]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    return edit


def replace_tensor(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        file = shard_of(folder, name)
        save_file({**load_file(file), name: tensor}, file)

    return replace


def truncate(folder: Path) -> None:
    file = shard_of(folder, "model.norm.weight")
    file.write_bytes(file.read_bytes()[:-10])


def garbage(folder: Path) -> None:
    shard_of(folder, "model.norm.weight").write_bytes(b"\xff" * 400)


def write_config(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text, encoding="utf-8") and None


NORM = "model.norm.weight"
BROKEN: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no config": (remove("config.json"), ["config.json: no such file"]),
    "broken config": (write_config("{\n,}"), ["config.json:2: not JSON"]),
    "config is a list": (write_config("[]"), ["a JSON object is needed, not list"]),
    "not a llama": (write_config('{"model_type": "gpt2"}'), ["only `llama`"]),
    "no weights": (remove(INDEX), ["no model.safetensors and no model.safetensors.index.json"]),
    "shard missing": (
        lambda folder: shard_of(folder, NORM).unlink(),
        ["no such file", "download it again"],
    ),
    "truncated": (truncate, ["not a whole safetensors file", "download it again"]),
    "garbage": (garbage, ["not a whole safetensors file"]),
    "index points outside": (
        edit_index(lambda index: index.update({NORM: "../../etc/passwd"})),
        [NORM, "'../../etc/passwd', outside the folder"],
    ),
    "index points nowhere": (
        edit_index(lambda index: index.update({NORM: 7})),
        ["outside the folder"],
    ),
    "index lacks a tensor": (
        edit_index(lambda index: index.pop(NORM)),
        [NORM, "is here, but not in model.safetensors.index.json"],
    ),
    "index names another shard": (
        edit_index(lambda index: index.update({NORM: index["model.embed_tokens.weight"]})),
        [NORM, "is missing, though the index says"],
    ),
    "wrong shape": (
        replace_tensor(NORM, torch.zeros(31)),
        [NORM, "has shape [31], config.json implies [32]"],
    ),
    "wrong dtype": (replace_tensor(NORM, torch.zeros(32, dtype=torch.int8)), [NORM, "is I8"]),
    "surplus": (
        lambda folder: [
            replace_tensor("model.norm.weight", torch.zeros(32))(folder),
            save_file(
                {**load_file(shard_of(folder, NORM)), "model.layers.2.x": torch.zeros(1)},
                shard_of(folder, NORM),
            ),
            edit_index(
                lambda index: index.update({"model.layers.2.x": index[NORM]})
            )(folder),
        ]
        and None,
        ["model.layers.2.x is not part of a Llama"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_a_broken_checkpoint_is_refused_by_name(copy: Path, case: str) -> None:
    change, words = BROKEN[case]
    change(copy)
    with pytest.raises(RequestError) as refused:
        read_checkpoint(copy)
    for word in words:
        assert word in str(refused.value)
    assert str(copy) in str(refused.value)


def test_all_broken_files_are_named_at_once(copy: Path) -> None:
    truncate(copy)
    shard_of(copy, "model.embed_tokens.weight").unlink()
    with pytest.raises(RequestError) as refused:
        read_checkpoint(copy)
    assert len(refused.value.problems) >= 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(copy: Path, bad: float) -> None:
    norm = torch.ones(32)
    norm[5] = bad
    replace_tensor(NORM, norm)(copy)
    checkpoint = read_checkpoint(copy)
    with pytest.raises(RequestError, match=f"{NORM} holds NaN or infinite"):
        read_pieces(checkpoint, [Piece(NORM, 0, torch.empty(32))])


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
    assert "lm_head.weight" not in read_checkpoint(folder).tensors
