"""A block over weights in 4 bits, beside the same in the usual dtype; and what unpacking takes.

python -m benchmarks.four_bits [--hidden 1024] [--tokens 2048] [--turns 5]

Both take turns in one process, so that they meet the same machine. Prints, for tiles of 64 and 256
tokens, the median CPU seconds of each, and the median of the quotients of neighbouring turns. All
tiles share one unpacking in each direction: the more tokens, the less it weighs.

python -m benchmarks.four_bits --lines --device cuda --size 8b

prints JSON lines for benchmarks.gpu: seconds to unpack one matrix with plain torch and with the
Triton kernel, and whether they give the same bits; then forward and backward of a block of this
size and, on a GPU, of one of the 70B model, packed and not, with the memory that each takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.turns import settle
from benchmarks.workloads import SIZES
from minilora.model import nf4
from minilora.model.llama import Block
from minilora.model.llama_shape import LlamaShape, Rope
from minilora.model.nf4 import pack, unpack
from minilora.model.nf4_shape import unpacked_columns
from minilora.model.tiles import document_tiles

TILES = (64, 256)
# Heads, kv heads, MLP features and hidden size of Llama-3.1-70B.
OF_70B = {"num_heads": 64, "num_kv_heads": 8, "intermediate_size": 28672, "hidden_size": 8192}


def block_shape(hidden: int) -> LlamaShape:
    """The proportions of Llama 3.1 8B's blocks."""
    return LlamaShape(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_layers=1,
        num_heads=hidden // 64,
        num_kv_heads=max(hidden // 256, 1),
        head_dim=64,
        rms_norm_eps=1e-5,
        rope=Rope(500000.0),
    )


def make_blocks(shape: LlamaShape) -> tuple[Block, Block]:
    """The same weights, as they are and packed."""
    plain = Block(shape, 0, saves_activations=False)
    packed = Block(replace(shape, packed=True), 0, saves_activations=False)
    for name, parameter in plain.named_parameters():
        parameter.data.normal_(std=0.02)
        held = packed.get_parameter(name)
        held.data.copy_(pack(parameter) if held.dtype == torch.uint8 else parameter)
    return plain, packed


def seconds(block: Block, tokens: int, tile_tokens: int, dtype: torch.dtype) -> float:
    """Of one forward and backward, which recomputes the block."""
    hidden = torch.randn(tokens, block.input_layernorm.weight.numel(), dtype=dtype)
    hidden.requires_grad_()
    shape = block_shape(hidden.shape[1])
    tiles = document_tiles(shape, [[tile_tokens]] * (tokens // tile_tokens), 0, hidden)
    began = time.process_time()
    block(hidden, tiles).sum().backward()
    return time.process_time() - began


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
                parameter.data.random_(0, 64)  # every absmax is then finite
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


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.four_bits")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--lines", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES), default="8b")
    args = parser.parse_args()
    settle(args.device)
    if args.lines:
        for row in lines(args.size, args.device):
            print(json.dumps(row), flush=True)
        return

    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        plain, packed = make_blocks(block_shape(args.hidden))
        for tile in TILES:
            turns = []
            for _ in range(args.turns + 1):
                times = [seconds(block, args.tokens, tile, dtype) for block in (plain, packed)]
                turns.append(times)
            usual, four_bits = (
                statistics.median(column) for column in zip(*turns[1:], strict=True)
            )
            ratio = statistics.median(b / a for a, b in turns[1:])
            print(
                f"{dtype}, tile {tile}: {usual:.3f} s, in 4 bits {four_bits:.3f} s, {ratio:.3f} x"
            )


if __name__ == "__main__":
    main()
