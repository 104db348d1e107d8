"""python -m benchmarks.gpu: everything that wants a GPU, in one command and under ten minutes.

Needs one GPU and no network: weights are random, made on the device. Parity of the fast paths,
then predicted beside measured memory under the cap of a 24 GB card, then speed beside the peers,
last whether torch.compile would pay; what matters most comes first, each row is a JSON line as soon
as it is there, and a short table ends it. `--device cpu --size tiny` runs the same on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory, report, speed
from benchmarks.turns import ROOT, Variant, settle
from benchmarks.workloads import SIZES, Size, weight
from minilora.model.attention import causal_attention
from minilora.model.llama import Llama
from minilora.model.lora import inject, lora_parameters
from minilora.model.tiles import document_tiles

FIRST_SPEED = ("trainer", "minilora", "minilora-tile-1-rows", "minilora-keep", "bare-recompute")


def attention_parity(device: str) -> Iterator[dict[str, Any]]:
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


def model_parity(size: Size, device: str) -> Iterator[dict[str, Any]]:
    """Two blocks' loss and LoRA gradients: bf16 beside fp32, then tiles, pieces and offloading."""
    size = dataclasses.replace(size, layers=2)
    lengths = [size.equal // 4, size.equal // 8, 3 * size.equal // 8]

    def run(
        dtype: torch.dtype, tiles: int = 1, piece: int | None = None, away: bool = False
    ) -> Any:
        with torch.device(device):
            model = Llama(size.shape).to(dtype)
        inject(model, size.lora, 0, dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weight(name, parameter.shape, parameter))
        if away:
            model.model.offload_inputs()
        ids = torch.arange(sum(lengths), device=device) % size.vocab
        groups = [lengths] if tiles == 1 else [[length] for length in lengths]
        laid = document_tiles(size.shape, groups, 0, model.lm_head.weight[:0], piece)
        loss = model(ids, ids, laid, 1 / len(ids))
        loss.backward()
        return [loss.detach()], [p.grad for _, p in lora_parameters(model)]

    exact, low = run(torch.float32), run(torch.bfloat16)
    for index, what in enumerate(("loss", "gradients")):
        yield parity(f"bf16 beside fp32, {what}", low[index], exact[index], (1e-2, 1e-1)[index])
    for name, other in (
        ("tiles", run(torch.bfloat16, tiles=3)),
        ("pieces", run(torch.bfloat16, piece=max(lengths) // 3)),
        ("inputs on the host", run(torch.bfloat16, away=True)),
    ):
        yield parity(f"bf16, {name}, gradients", other[1], low[1], 2e-2)


def parity(what: str, found: Sequence[Tensor], expected: Sequence[Tensor], limit: float) -> Any:
    """A row: the largest difference in norm of any pair of tensors, relative."""
    errors = [
        float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30))
        for a, b in zip(found, expected, strict=True)
    ]
    return {"part": "parity", "what": what, "error": max(errors), "ok": max(errors) < limit}


def context(device: str) -> Iterator[dict[str, Any]]:
    """What the card has, and what CUDA took of it beside torch's allocator, once kernels ran."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        taken = total - free - torch.cuda.memory_reserved()
        yield {"part": "card", "name": torch.cuda.get_device_name(), "total": total,
               "context": taken}  # fmt: skip


def cases(size: str, on_gpu: bool) -> list[memory.Case]:
    """The sweep of benchmarks.memory, the rows that the goals are about first."""
    few = 1 if size == "8b" else 16

    def later(case: memory.Case) -> bool:
        usual = dataclasses.replace(case, deepspeed="zero3", batch=4, gather_tokens=None)
        near = case.gather_tokens == 8192 // few and case.batch == 4
        return not (
            (case.system == "peer")
            or (near and usual.tile_tokens == 2048 // few)
            or (case.deepspeed == "zero3" and case.batch == 4 and case.gather_tokens is None)
        )

    return sorted(memory.sweep(size, on_gpu), key=later)


class Run:
    """Rows that come in, until the time is over."""

    def __init__(self, own: argparse.Namespace) -> None:
        self.own, self.rows = own, list[dict[str, Any]]()
        self.deadline = time.monotonic() + 60 * own.minutes
        self.peer: Any = None

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.own.out:
            with self.own.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def child(self, part: str, *words: str) -> None:
        """A process of its own, whose JSON lines are rows."""
        if (left := self.deadline - time.monotonic()) < 5:
            return
        command = [sys.executable, "-m", *words, "--device", self.own.device]
        command += ["--size", self.own.size]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            return
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            self.add({"part": part, "error": done.stderr[-2000:], "command": command[2:]})
        for line in lines:
            self.add({"part": part, **json.loads(line)})

    def memory(self, found: Sequence[memory.Case]) -> None:
        """Three at a time on a GPU, where each may have a third of it; they share its time."""
        with ThreadPoolExecutor(3 if self.own.device == "cuda" else 1) as pool:
            words = [json.dumps([dataclasses.asdict(case)]) for case in found]
            start = partial(self.child, "memory", "benchmarks.memory", "--only", "0", "--cases")
            list(pool.map(start, words))

    def speed(self, variants: Sequence[tuple[str, Variant]]) -> None:
        """Each alone; the first one is whom the others are compared with."""
        words = ["--device", self.own.device, "--size", self.own.size, "--timed", "2"]
        options, size = speed.read(words), SIZES[self.own.size]
        for group, variant in variants:
            if time.monotonic() > self.deadline - 40:
                return
            with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
                try:
                    played = speed.play([variant], self.peer, options, Path(folder))
                    row = report.measure(played[0], played[-1], size, group)
                except (RuntimeError, OSError) as error:
                    row = {"group": group, "variant": variant.name, "error": str(error)[-2000:]}
                else:
                    self.peer = self.peer or self._kept(played[0])
            self.add({"part": "speed", **row})

    def _kept(self, player: Any) -> Any:
        """The peer, with the gradients that the others are compared with in a file that stays."""
        path = Path(tempfile.mkdtemp(prefix="gpu-peer-"), "gradients.pt")
        path.write_bytes(Path(player.news[0]["gradients"]).read_bytes())
        player.news[0]["gradients"] = str(path)
        return player

    def table(self) -> Iterator[str]:
        for row in self.rows:
            if row["part"] == "parity" and "what" in row:
                yield f"{'ok ' if row['ok'] else 'BAD'} {row['error']:.1e} {row['what']}"
        found = [row for row in self.rows if row["part"] == "memory" and "measured" in row]
        if found:
            yield from memory.shown(found)
        rates = [row for row in self.rows if row["part"] == "speed" and "step_seconds" in row]
        for row in rates:
            yield (
                f"{row['group']} {row['variant']}: {row['tokens_per_second']['median']:,.0f} "
                f"tokens/s, {row['step_seconds']['median']:.2f} s a step"
            )
        if wrong := sum("error" in row and "ok" not in row for row in self.rows):
            yield f"{wrong} rows failed: see their lines"


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="8b", choices=tuple(SIZES))
    parser.add_argument("--minutes", type=float, default=9, help="start nothing after these")
    parser.add_argument("--first", type=int, help="only so many rows of memory, and of speed")
    parser.add_argument("--parity", action="store_true", help="that part alone, in this process")
    parser.add_argument("--out", type=Path, help="append the JSON lines here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 1 if a row failed or a parity is bad."""
    own = read(argv)
    settle(own.device)
    if own.parity:
        parts: list[Callable[[], Iterator[dict[str, Any]]]] = [
            lambda: attention_parity(own.device),
            lambda: model_parity(SIZES[own.size], own.device),
            lambda: context(own.device),
        ]
        for part in parts:
            for row in part():
                print(json.dumps(row), flush=True)
        return 0
    run, found = Run(own), cases(own.size, own.device == "cuda")[: own.first]
    groups = speed.groups(SIZES[own.size], "cuda")
    variants = [(group, variant) for group, members in groups.items() for variant in members]
    variants.sort(key=lambda pair: (*FIRST_SPEED, pair[1].name).index(pair[1].name))
    variants = variants[: own.first]
    run.add({"part": "versions", **report.versions()})
    run.child("parity", "benchmarks.gpu", "--parity")
    run.memory(found[:9])
    run.speed(variants[:2])
    run.memory(found[9:])
    run.speed(variants[2:])
    if own.device == "cuda":  # on a CPU it would need a compiler
        run.child("leaves", "benchmarks.leaves")
    print(*run.table(), sep="\n")
    return int(any("error" in row and not row.get("ok") for row in run.rows))


if __name__ == "__main__":
    sys.exit(main())
