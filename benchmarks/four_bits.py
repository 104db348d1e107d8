"""Forward and backward of one block over weights in 4 bits, beside the same in the usual dtype.

python -m benchmarks.four_bits [--hidden 1024] [--tokens 2048] [--turns 5]

Both take turns in one process, so that they meet the same machine. Prints, for tiles of 64 and 256
tokens, the median CPU seconds of each, and the median of the quotients of neighbouring turns. All
tiles share one unpacking in each direction: the more tokens, the less it weighs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch

from minilora.model.llama import Block
from minilora.model.llama_shape import LlamaShape, Rope
from minilora.model.nf4 import pack
from minilora.model.tiles import document_tiles

TILES = (64, 256)


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


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.four_bits")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()

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
