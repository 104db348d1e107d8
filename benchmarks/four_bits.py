"""Forward and backward of one block over weights in 4 bits, beside the same in the usual dtype.

python -m benchmarks.four_bits [--hidden 1024] [--tokens 2048] [--turns 5] [--out FOLDER]

Both take turns in one process, so that they meet the same machine. Prints, for tiles of 64 and 256
tokens, the median CPU seconds of each, and the median of the quotients of neighbouring turns. All
tiles share one unpacking in each direction: the more tokens, the less it weighs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.report import versions
from benchmarks.turns import settle
from minilora.model.llama import Block
from minilora.model.llama_shape import LlamaShape, Rope
from minilora.model.nf4 import pack
from minilora.model.tiles import document_tiles

TILES = (64, 256)
HEADERS = ("| dtype | tile | s | s in 4 bits | ratio |", "| --- | --- | --- | --- | --- |")


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


def compare(hidden: int, tokens: int, turns: int, dtype: torch.dtype) -> Iterator[str]:
    """A line of the table for each tile."""
    torch.set_default_dtype(dtype)
    plain, packed = make_blocks(block_shape(hidden))
    for tile in TILES:
        times = [
            [seconds(block, tokens, tile, dtype) for block in (plain, packed)]
            for _ in range(turns + 1)
        ][1:]  # the first turn warms up
        usual, four_bits = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(b / a for a, b in times)
        name = str(dtype).removeprefix("torch.")
        yield f"| {name} | {tile} | {usual:.3f} | {four_bits:.3f} | {ratio:.3f} |"


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.four_bits")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for four-bits-cpu.md")
    return parser.parse_args(argv)


def main() -> None:
    args = read(None)
    settle("cpu")

    facts = ", ".join(f"{key} {value}" for key, value in versions().items())
    lines = [f"`python -m benchmarks.four_bits {' '.join(sys.argv[1:])}`: {facts}", "", *HEADERS]
    for dtype in (torch.float32, torch.bfloat16):
        for line in compare(args.hidden, args.tokens, args.turns, dtype):
            print(line, flush=True)
            lines.append(line)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        text = "\n".join([*lines, ""])
        (args.out / "four-bits-cpu.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
