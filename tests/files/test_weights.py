"""Reading base weights: exact pieces, little memory, and every broken file refused by name."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from minilora.files.model_config import read_model_config
from minilora.files.tensor_parts import STRIP, TensorPart, readings
from minilora.files.weights import INDEX, SINGLE, read_checkpoint, read_parts
from minilora.model.nf4 import PIECE, pack
from minilora.model.nf4_shape import packed_columns
from minilora.settings.errors import RequestError
from minilora.tiny.checkpoint import write_tiny
from tests.support.broken_weights import (
    BROKEN,
    NORM,
    edit_index,
    replace_tensor,
    shard_of,
    truncate,
)
from tests.support.processes import PACKABLE


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_range_of_packed_bytes_is_that_of_the_packed_matrix(tmp_path: Path, dtype: str) -> None:
    """Rows that the range touches are read, and no other."""
    write_tiny(tmp_path / "model", replace(PACKABLE, dtype=dtype))
    checkpoint = read_checkpoint(read_model_config(tmp_path / "model"))
    generator = torch.Generator().manual_seed(0)
    for path in checkpoint.shape.linear_layers():
        name = f"{path}.weight"
        stored = checkpoint.tensors[name]
        columns = stored.shape[1]
        row_bytes = packed_columns(columns)
        packed = pack(load_file(stored.file)[name]).view(-1)
        ends = torch.randint(0, len(packed) + 1, (2,), generator=generator)
        for start, stop in (sorted(ends.tolist()), (0, len(packed)), (row_bytes - 1, row_bytes)):
            destination = torch.full((stop - start,), 7, dtype=torch.uint8)
            count = read_parts(checkpoint, [TensorPart(name, start, destination)])
            assert torch.equal(destination, packed[start:stop])
            rows = -(-stop // row_bytes) - start // row_bytes
            assert count == rows * columns * stored.dtype.itemsize


def test_other_parts_are_read_in_strips_that_end_at_the_same_places() -> None:
    start, end = STRIP - 5, 3 * STRIP + 7
    found = list(readings(TensorPart("", start, torch.empty(end - start, device="meta")), 1024))
    assert [one.start for one in found] == [start, STRIP, 2 * STRIP, 3 * STRIP]
    assert [one.elements for one in found] == [5, STRIP, STRIP, 7]
    assert [len(one.destination) for one in found] == [5, STRIP, STRIP, 7]


def test_a_long_matrix_is_packed_a_few_rows_at_a_time() -> None:
    destination = torch.empty(2**14 * packed_columns(1024) - 5, dtype=torch.uint8, device="meta")
    found = list(readings(TensorPart("", 3, destination), columns=1024))
    assert [reading.start for reading in found] == [0, PIECE, 2 * PIECE, 3 * PIECE]
    assert {reading.elements for reading in found} == {PIECE}
    assert [reading.skipped for reading in found] == [3, 0, 0, 0]
    assert sum(len(reading.destination) for reading in found) == len(destination)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_at_8b_a_rank_reads_its_share_and_little_more(ranks: int) -> None:
    """Parts as DeepSpeed cuts them: equally long, the last ones shorter."""
    config = read_model_config(Path("examples/llama-3.1-8b"), quantization_bit=4)
    shapes = config.shape.parameter_shapes()
    packed = {f"{path}.weight" for path in config.shape.linear_layers()}
    total = sum(math.prod(shape) for shape in shapes.values())
    read = [0] * ranks
    for name, shape in config.shape.held_shapes().items():
        dtype = torch.uint8 if name in packed else torch.bfloat16
        whole = torch.empty(math.prod(shape), dtype=dtype, device="meta")
        size = -(-len(whole) // ranks)
        for rank in range(ranks):
            part = TensorPart(name, rank * size, whole[rank * size : (rank + 1) * size])
            read[rank] += sum(one.elements for one in readings(part, shapes[name][-1]))

    assert max(read) <= 1.01 * total / ranks
    # Of every packed matrix each cut but the outer two may be read twice: one row.
    cut_rows = (ranks - 1) * sum(shapes[name][-1] for name in packed)
    assert total <= sum(read) <= total + cut_rows
    assert ranks in (1, 2) or sum(read) > total, "some cut lies inside a row"


def test_a_single_file_without_an_index_is_read(tiny: Path, copy: Path) -> None:
    tensors = {}
    for file in copy.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (copy / INDEX).unlink()
    save_file(tensors, copy / "model.safetensors")
    whole = read_checkpoint(read_model_config(copy))
    assert whole.total_bytes == read_checkpoint(read_model_config(tiny)).total_bytes


def test_a_single_file_is_read_beside_the_index_of_an_older_model(copy: Path) -> None:
    """As transformers does. With the older shards there too, nobody knows which are meant."""
    tensors: dict[str, torch.Tensor] = {}
    shards = list(copy.glob("*.safetensors"))
    for file in shards:
        tensors |= {name: tensor * 2 for name, tensor in load_file(file).items()}
    save_file(tensors, copy / SINGLE, {"format": "pt"})
    with pytest.raises(RequestError, match=f"{SINGLE} and also the shards of {INDEX}.* remove one"):
        read_checkpoint(read_model_config(copy))

    for file in shards:
        file.unlink()
    checkpoint = read_checkpoint(read_model_config(copy))
    theirs = LlamaForCausalLM.from_pretrained(copy, dtype=torch.float32).state_dict()
    for name in checkpoint.tensors:
        found = torch.empty(theirs[name].numel())
        read_parts(checkpoint, [TensorPart(name, 0, found)])
        assert torch.equal(found, theirs[name].view(-1)), name


def test_links_of_a_folder_are_followed(tiny: Path, copy: Path, tmp_path: Path) -> None:
    """Old downloads put the files into a cache and links into the folder."""
    for number, file in enumerate(copy.glob("*.safetensors")):
        file.rename(tmp_path / str(number))
        file.symlink_to(tmp_path / str(number))
    linked = read_checkpoint(read_model_config(copy))
    for name in linked.tensors:
        parts = torch.empty(2, 32)
        read_parts(linked, [TensorPart(name, 0, parts[0])])
        read_parts(read_checkpoint(read_model_config(tiny)), [TensorPart(name, 0, parts[1])])
        assert torch.equal(parts[0], parts[1]), name


@pytest.mark.slow
def test_reading_needs_no_more_memory_than_the_part(tmp_path: Path) -> None:
    """A process that reads a seventh of a 210 MB tensor, 30 MB, grows by some strips of it.

    One that packs the whole tensor grows by what packing a piece of four million weights takes:
    its numbers in fp32 as read, in bf16, in fp32 again, and their magnitudes. Bounds are two and a
    half times these, because memory that is freed does not all go back to the system at once.
    """
    script = f"""
import dataclasses, torch
from pathlib import Path
from safetensors.torch import save_file
from minilora.files.tensor_parts import TensorPart
from minilora.files.weights import Checkpoint, StoredTensor, read_parts
from minilora.model.nf4_shape import packed_columns
path = Path({str(tmp_path)!r}) / "big.safetensors"
stored = StoredTensor(path, 8 + int.from_bytes(path.open("rb").read(8), "little"),
                      (7500, 7000), torch.float32)
def peak():  # in KiB, and from now on anew; getrusage would give that of the parent process
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(status.split("VmHWM:")[1].split()[0])
part = torch.zeros(7500 * 1000)
peak()
before = peak()
checkpoint = Checkpoint(path.parent, None, {{"big": stored}})
read_parts(checkpoint, [TensorPart("big", 7500 * 1000, part)])
assert part[0] == 7500 * 1000 and part[-1] == 2 * 7500 * 1000 - 1
print(peak() - before)

# The same numbers as a matrix that can be packed.
packed = torch.zeros(8192 * packed_columns(6400), dtype=torch.uint8)
stored = dataclasses.replace(stored, shape=(8192, 6400))
checkpoint = Checkpoint(path.parent, None, {{"big": stored}})
peak()
before = peak()
read_parts(checkpoint, [TensorPart("big", 0, packed)])
assert packed[[0, 31, -1]].tolist() == [0x77, 0xFF, 0x4C]
print(peak() - before)
"""
    # Up to 2**24 fp32 counts without a gap; the part read lies below that.
    save_file(
        {"big": torch.arange(7500 * 7000).float().view(7500, 7000)}, tmp_path / "big.safetensors"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, packing = (int(line) * 1024 for line in done.stdout.split())
    strip, piece = STRIP * 4, PIECE * (4 + 2 + 4 + 4)
    assert 0 < grown < 2.5 * strip < 7500 * 1000 * 4, f"{grown / 1e6} MB"
    assert 0 < packing < 2.5 * piece < 7500 * 7000 * 4, f"{packing / 1e6} MB"


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
    assert len(refused.value.problems) == 2


def test_a_tensor_of_a_dtype_that_is_not_read_is_named_once(copy: Path) -> None:
    replace_tensor(NORM, torch.zeros(32, dtype=torch.int8))(copy)
    with pytest.raises(RequestError) as refused:
        read_checkpoint(read_model_config(copy))
    assert len(refused.value.problems) == 1


def test_many_problems_of_one_kind_are_shortened(copy: Path) -> None:
    """Shards of another model beside this one's index."""
    edit_index(lambda index: index.update({f"x.{number}": index[NORM] for number in range(99)}))(
        copy
    )
    with pytest.raises(RequestError) as refused:
        read_checkpoint(read_model_config(copy))
    assert len(refused.value.problems) == 6
    assert refused.value.problems[-1] == "... and 94 more like the last one"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(copy: Path, bad: float) -> None:
    norm = torch.ones(32)
    norm[5] = bad
    replace_tensor(NORM, norm)(copy)
    checkpoint = read_checkpoint(read_model_config(copy))
    with pytest.raises(RequestError, match=f"{NORM} holds NaN or infinite"):
        read_parts(checkpoint, [TensorPart(NORM, 0, torch.empty(32))])


@pytest.mark.parametrize("bad", [float("nan"), 3.4e38])
def test_packed_weights_that_are_not_finite_in_bf16_are_refused(tmp_path: Path, bad: float) -> None:
    write_tiny(tmp_path / "model", PACKABLE)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = torch.ones(128, 64)
    weight[100, 5] = bad
    replace_tensor(name, weight)(tmp_path / "model")
    checkpoint = read_checkpoint(read_model_config(tmp_path / "model"))
    with pytest.raises(RequestError, match=f"{name} holds NaN or infinite"):
        read_parts(checkpoint, [TensorPart(name, 0, torch.empty(128 * 34, dtype=torch.uint8))])
