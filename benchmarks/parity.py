"""Whether the fast ways of a GPU compute the same as the slow ones: rows for benchmarks.gpu.

Also what the card has, and what CUDA and NCCL take of it beside torch's allocator.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.workloads import Size, weight
from minilora.model.attention import causal_attention
from minilora.model.llama import Llama
from minilora.model.lora import copies_of_pairs, inject, lora_parameters
from minilora.model.tiles import document_tiles

Row = dict[str, Any]


def attention_parity(device: str) -> Iterator[Row]:
    """The kernel that bf16 takes on this device beside SDPA in fp32, document by document."""
    lengths = (300, 1, 77, 512)
    n, make = sum(lengths), torch.Generator(device).manual_seed(1)
    whole = [torch.randn(n, heads, 128, generator=make, device=device) for heads in (32, 8, 8)]
    inputs = [x.bfloat16().float() for x in whole]  # both get the same numbers
    boundaries = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)

    def run(dtype: torch.dtype) -> list[Tensor]:
        query, key, value = given = [x.to(dtype).requires_grad_() for x in inputs]
        out = causal_attention(query, key, value, lengths, boundaries)
        return [out, *torch.autograd.grad(out, given, torch.ones_like(out))]

    for name, low, exact in zip(
        ("output", "query's", "key's", "value's"), run(torch.bfloat16), run(torch.float32),
        strict=True,
    ):  # fmt: skip
        yield parity(f"attention in bf16, {name}", [low], [exact], 2e-2)


def model_parity(size: Size, device: str) -> Iterator[Row]:
    """Two blocks' loss and LoRA gradients: bf16 beside fp32, then every way beside one tile."""
    size = dataclasses.replace(size, layers=2)
    lengths = [size.equal // 4, size.equal // 8, 3 * size.equal // 8]

    def run(
        dtype: torch.dtype, piece: int | None = None, tiles: int = 1, away: bool = False,
        keep: int = 0, masters: bool = False,
    ) -> Any:  # fmt: skip
        with torch.device(device):
            model = Llama(size.shape, keep).to(dtype)
        inject(model, size.lora, 0, torch.float32 if masters else dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # The numbers are those of dtype, whatever they are held in.
                parameter.copy_(weight(name, parameter.shape, parameter.to(dtype)))
        copies_of_pairs(model, dtype)
        if away:
            model.model.offload_inputs()
        ids = torch.arange(sum(lengths), device=device) % size.vocab
        groups = [lengths] if tiles == 1 else [[length] for length in lengths]
        laid = document_tiles(size.shape, groups, 0, model.lm_head.weight[:0], piece)
        # Labels stay on the host, as the engine has them: how many there are is a size there.
        loss = model(ids, ids.cpu(), laid, 1 / len(ids))
        loss.backward()
        return [loss.detach()], [p.grad for _, p in lora_parameters(model)]

    exact, low = run(torch.float32), run(torch.bfloat16)
    for index, what in enumerate(("loss", "gradients")):
        yield parity(f"bf16 beside fp32, {what}", low[index], exact[index], (1e-2, 1e-1)[index])
    for name, other in (
        ("tiles", run(torch.bfloat16, tiles=3)),
        ("pieces", run(torch.bfloat16, piece=max(lengths) // 3)),
        ("inputs on the host", run(torch.bfloat16, away=True)),
        ("activations saved", run(torch.bfloat16, keep=2)),
        ("fp32 adapter, as at stage 0", run(torch.bfloat16, masters=True)),
    ):
        yield parity(f"bf16, {name}, gradients", other[1], low[1], 2e-2)


def parity(what: str, found: Sequence[Tensor], expected: Sequence[Tensor], limit: float) -> Row:
    """A row: the largest difference in norm of any pair of tensors, relative."""
    errors = [
        float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30))
        for a, b in zip(found, expected, strict=True)
    ]
    return {"part": "parity", "what": what, "error": max(errors), "ok": max(errors) < limit}


def card(device: str) -> Iterator[Row]:
    """What the card has, and what CUDA took of it beside torch's allocator, once kernels ran.

    Then what NCCL takes with one rank: the least that it can be, more comes with each peer.
    """
    if device != "cuda":
        return

    def beside() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    found = torch.cuda.get_device_properties(0)
    context = beside()
    yield {"part": "card", "name": found.name, "total": found.total_memory, "context": context}
    if os.environ.get("BENCHMARK_FAKE"):
        return
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    dist.all_reduce(torch.ones(2**18, device=device))
    torch.cuda.synchronize()
    yield {"part": "card", "nccl of one rank": beside() - context}
    dist.destroy_process_group()
