"""What unpacking 4-bit weights takes, alone and in a block.

python -m benchmarks.unpacking --device cuda --size 8b

JSON lines: seconds to unpack one matrix with plain torch and as `unpack` does it on this device,
and whether both give the same bits; then forward and backward of a block of this size and, on a
GPU, of one of the 70B model, packed and not, with the memory that each takes there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.meters import make_up
from benchmarks.turns import settle
from benchmarks.workloads import SIZES
from minilora.model import nf4
from minilora.model.llama import Block
from minilora.model.llama_shape import LlamaShape
from minilora.model.nf4 import pack, unpack
from minilora.model.nf4_shape import unpacked_columns
from minilora.model.tiles import document_tiles

# Heads, kv heads, MLP features and hidden size of Llama-3.1-70B.
OF_70B = {"num_heads": 64, "num_kv_heads": 8, "intermediate_size": 28672, "hidden_size": 8192}


def timed(work: Callable[[], object], device: str, times: int = 5) -> float:
    """Median seconds of a call, all kernels done, after one that does not count."""
    found = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def unpacking(rows: int, columns: int, dtype: torch.dtype, device: str) -> Iterator[dict[str, Any]]:
    """One matrix (rows, columns): plain torch, and what `unpack` takes on this device."""
    held = pack(torch.randn(rows, columns, device=device, dtype=dtype))
    levels = nf4._levels(held.device)

    def plain() -> Tensor:
        weight = held.new_empty((rows, unpacked_columns(held.shape[1])), dtype=dtype)
        nf4._unpack_plain(held, levels, weight)
        return weight

    row = {"matrix": [rows, columns], "plain_s": timed(plain, device)}
    row["s"] = timed(lambda: unpack(held, dtype), device)
    row["fused"] = device == "cuda" and nf4._fused(held.device, dtype) is not None
    yield row | {"same bits": torch.equal(plain(), unpack(held, dtype))}


def of_a_block(
    name: str, shape: LlamaShape, tokens: int, dtype: torch.dtype, device: str
) -> Iterator[dict[str, Any]]:
    """Forward and backward of a block in one tile, recomputed, packed and not."""
    torch.set_default_dtype(dtype)
    for packed in (True, False):
        with torch.device(device):
            block = Block(replace(shape, packed=packed), 0, saves_activations=False)
        for parameter in block.parameters():
            if parameter.dtype == torch.uint8:
                make_up(parameter.data)
            else:
                parameter.data.normal_(std=0.02)
        hidden = torch.randn(tokens, shape.hidden_size, device=device, requires_grad=True)
        tiles = document_tiles(shape, [[tokens // 4] * 4], 0, hidden)
        row = {"block": name, "packed": packed, "tokens": tokens}
        row["s"] = timed(lambda: block(hidden, tiles).sum().backward(), device, times=3)  # noqa: B023
        if device == "cuda":
            row["allocated"] = torch.cuda.max_memory_allocated()
            del block, hidden, tiles
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield row


def lines(size: str, device: str) -> Iterator[dict[str, Any]]:
    """All rows for benchmarks.gpu."""
    shape, on_gpu = SIZES[size].shape, device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    for name in ("k_proj", "up_proj", "down_proj"):
        yield from unpacking(*shape.linear_shapes()[name], dtype, device)
    tokens = 8192 if on_gpu else 256
    yield from of_a_block(size, shape, tokens, dtype, device)
    if on_gpu:
        yield from of_a_block("70b", replace(shape, **OF_70B), tokens, dtype, device)


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.unpacking", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES), default="mid")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    own = read(argv)
    settle(own.device)
    for row in lines(own.size, own.device):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
