"""Base weights in safetensors files: all headers are checked first, then numbers are read in parts.

What a rank reads is what it keeps. With ZeRO-3 DeepSpeed flattens every parameter and gives each
rank one range of its elements, so a rank needs 1/N of every tensor on N ranks. A `TensorPart` is
such a range together with the memory that it goes to: the rank's own partition of the parameter.
The headers say where each tensor begins in its file, so reading a range is one seek and one read.
No rank reads numbers for another one, none has a whole tensor in memory while it reads, and all of
them together read each byte once. At lower stages every rank keeps whole tensors, and reads them.

Where weights are held in 4 bits, each rank packs its own part while it reads (tensor_parts.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minilora.files.model_config import ModelConfig
from minilora.files.tensor_parts import Reading, TensorPart, readings
from minilora.files.weight_files import INDEX, SINGLE, weight_files
from minilora.files.weights_digest import WeightsDigest
from minilora.model.llama_shape import LlamaShape
from minilora.model.nf4 import pack
from minilora.settings.errors import RequestError, shortened

__all__ = ["INDEX", "SINGLE"]  # whoever handles weights takes these names from here

# The dtypes that Llama weights come in, by safetensors' names.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Old exports also hold the rotary frequencies, of each block or of the model. They are computed
# from config.json here.
DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(original_)?inv_freq")
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
COMPARED = 2**22  # elements of two tensors that are in memory at a time while they are compared


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `start` is the offset of its first byte in `file`."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a Llama in it whose files have been checked against its config.json.

    tensors: by parameter name, in the order of `LlamaShape.parameter_shapes`.
    files: all weight files, also one of which the model uses nothing.
    tied_head: where the files hold a head though config.json ties it to the embedding.
    """

    folder: Path
    shape: LlamaShape
    tensors: Mapping[str, StoredTensor]
    files: tuple[Path, ...] = ()
    tied_head: StoredTensor | None = None

    @property
    def total_bytes(self) -> int:
        """Size of all tensors in the dtypes of the files."""
        return sum(
            torch.Size(stored.shape).numel() * stored.dtype.itemsize
            for stored in self.tensors.values()
        )


def read_checkpoint(config: ModelConfig) -> Checkpoint:
    """Read the headers of all weight files and check them; no weights are read yet.

    Raises RequestError naming every file and tensor that is missing, surplus, cut short, outside
    the folder, or of another shape or dtype than config.json implies.
    """
    folder = config.folder
    names_by_file, problems = weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for file, indexed_names in names_by_file.items():
        try:
            held = _read_header(file)
        except RequestError as error:
            problems += error.problems
            continue
        if indexed_names is not None:
            problems += shortened([*_index_problems(file, indexed_names, held.keys())])
        tensors.update(held)

    # If a file cannot be read, it is no news that its tensors are missing.
    expected = config.shape.parameter_shapes()
    if not problems:
        problems = shortened([*_shape_problems(tensors, expected, folder)])
    if problems:
        raise RequestError(problems)
    return Checkpoint(
        folder,
        config.shape,
        {name: tensors[name] for name in expected},
        tuple(names_by_file),
        tensors.get(HEAD) if config.shape.tied else None,
    )


def check_tied_head(checkpoint: Checkpoint) -> None:
    """Raise RequestError if the files hold another head than the embedding that it is tied to.

    Both tensors are read, a part at a time. An equal copy is what many programs write.
    """
    head = checkpoint.tied_head
    if head is None:
        return
    embedding = checkpoint.tensors[EMBEDDING]
    both = replace(checkpoint, tensors={EMBEDDING: embedding, HEAD: head})
    total = torch.Size(head.shape).numel()
    same = head.shape == embedding.shape
    for start in range(0, total if same else 0, COMPARED):
        # In fp32, so that a copy in a wider dtype is equal.
        parts = torch.empty(2, min(COMPARED, total - start))
        read_parts(
            both, (TensorPart(n, start, p) for n, p in zip((EMBEDDING, HEAD), parts, strict=True))
        )
        same = torch.equal(parts[0], parts[1])
        if not same:
            break
    if not same:
        raise RequestError(
            [
                f"{head.file}: {HEAD} differs from {EMBEDDING}, but config.json ties them "
                "(tie_word_embeddings: true): set it to false if the head is right, or remove "
                f"{HEAD} from the file"
            ]
        )


def read_parts(
    checkpoint: Checkpoint, parts: Iterable[TensorPart], digest: WeightsDigest | None = None
) -> int:
    """Read each part from its file into its destination, converting the dtype.

    digest: counts each part as it lies in the file.
    Returns the number of bytes read. Host memory beside the destinations: that of one reading, 4 MB
    in bf16 where nothing is packed. Raises RequestError if a file ended early or a weight is not
    finite.
    """
    bytes_read = 0
    # One buffer serves all parts: memory that is fresh from the system costs more than reading.
    buffer = torch.empty(0, dtype=torch.uint8)
    with ExitStack() as stack:
        opened: dict[Path, BinaryIO] = {}
        for part in parts:
            stored = checkpoint.tensors[part.name]
            if stored.file not in opened:
                opened[stored.file] = stack.enter_context(stored.file.open("rb", buffering=0))
            for reading in readings(part, stored.shape[-1]):
                size = reading.elements * stored.dtype.itemsize
                if len(buffer) < size:
                    buffer = torch.empty(size, dtype=torch.uint8)
                numbers = buffer[:size].view(stored.dtype)
                _read_numbers(opened[stored.file], stored, part.name, reading.start, numbers)

                if digest is not None:
                    # A row of packed bytes that begins with another rank is counted by that rank.
                    begun = stored.shape[-1] if reading.skipped else 0
                    digest.add(part.name, reading.start + begun, numbers[begun:])
                if part.packed:
                    numbers = _packed(part.name, stored, numbers, reading)
                else:
                    _check_finite(part.name, stored, numbers)
                reading.destination.copy_(numbers)
                bytes_read += size
    return bytes_read


def _packed(name: str, stored: StoredTensor, numbers: Tensor, reading: Reading) -> Tensor:
    """The packed bytes of a reading that its destination gets. numbers: of whole rows, flat."""
    # On the GPU, if the destination lies there: a CPU core takes 0.1 us for each weight.
    rows = numbers.view(-1, stored.shape[1]).to(reading.destination.device, torch.bfloat16)
    _check_finite(name, stored, rows)
    return pack(rows).view(-1)[reading.skipped : reading.skipped + len(reading.destination)]


def _check_finite(name: str, stored: StoredTensor, numbers: Tensor) -> None:
    """Raises RequestError if a number is not finite."""
    # The least and the greatest number are NaN if any number is, and one of them is infinite if any
    # is. Asking isfinite() of all numbers takes a hundred times as long.
    if not torch.stack(torch.aminmax(numbers)).isfinite().all():
        raise RequestError([f"{stored.file}: {name} holds NaN or infinite weights"])


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name. Raises RequestError."""
    if not file.exists():
        problem = f"no such file, though {INDEX} names it; download it again"
        raise RequestError([f"{file}: {problem}"])
    if not file.is_file():  # a pipe would keep whoever opens it waiting
        raise RequestError([f"{file}: not a plain file; put the file itself there"])
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    try:
        # The library checks the header, and that the tensors fill the file from end to end. It is
        # asked for numpy: for torch it maps the file writable, which a small machine refuses.
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                tensor = opened.get_slice(name)
                shapes[name] = tuple(tensor.get_shape())
                dtypes[name] = tensor.get_dtype()
        # It does not tell where a tensor begins, so the header is read once more: 8 bytes with its
        # size, then JSON with each tensor's offsets, which count from the end of the header.
        with file.open("rb") as raw:
            header_size = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(header_size))
    except (SafetensorError, OSError, ValueError) as error:
        problem = f"not a whole safetensors file ({error}); download it again"
        raise RequestError([f"{file}: {problem}"]) from None

    unreadable = [name for name in shapes if dtypes[name] not in DTYPES]
    if unreadable:
        known = ", ".join(DTYPES)
        problems = [f"{file}: {name} is {dtypes[name]}; {known} can be read" for name in unreadable]
        raise RequestError(shortened(problems))
    data_start = 8 + header_size
    return {
        name: StoredTensor(
            file, data_start + int(header[name]["data_offsets"][0]), shape, DTYPES[dtypes[name]]
        )
        for name, shape in shapes.items()
    }


def _index_problems(
    file: Path, indexed_names: Iterable[str], held_names: Iterable[str]
) -> Iterator[str]:
    """Where the index and a file disagree about which tensors are in the file."""
    for name in sorted({*indexed_names} - {*held_names}):
        yield f"{file}: {name} is missing, though the index says it is here"
    for name in sorted({*held_names} - {*indexed_names}):
        yield f"{file}: {name} is here, but not in {INDEX}"


def _shape_problems(
    tensors: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], folder: Path
) -> Iterator[str]:
    """Where the files hold other tensors than the model has. expected: each parameter's shape."""
    for name in expected:
        if name not in tensors:
            yield f"{folder}: {name} is missing"
    for name, stored in tensors.items():
        if name not in expected:
            # A tied head may be stored too; `check_tied_head` compares it with the embedding.
            if name != HEAD and not DERIVED.fullmatch(name):
                yield f"{stored.file}: {name} is not part of the model of this config.json"
        elif stored.shape != expected[name]:
            found, implied = list(stored.shape), list(expected[name])
            yield f"{stored.file}: {name} has shape {found}, config.json implies {implied}"


def _read_numbers(
    opened: BinaryIO, stored: StoredTensor, name: str, start: int, numbers: Tensor
) -> None:
    """Fill `numbers` with the elements from `start` on, flat, in the dtype of the file.

    Raises RequestError if the file ends before.
    """
    opened.seek(stored.start + start * stored.dtype.itemsize)
    buffer = numbers.view(torch.uint8).numpy().data
    done = 0
    # One call may read less than it is asked for, at most 2 GiB on Linux.
    while done < len(buffer):
        count = opened.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise RequestError([f"{stored.file}: ends inside {name}; download it again"])
        done += count
