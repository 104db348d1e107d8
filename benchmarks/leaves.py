"""python -m benchmarks.leaves: would torch.compile pay for what is not a matmul?

Each leaf function of the model, forward and backward, as it is and as torch.compile makes it of
its plain formula, in turns; what a whole optimizer step would save, as a share of the time of its
matmuls, and what compiling costs once. Prints a JSON line per function. Needs a C++ compiler on a
CPU, Triton on a GPU; training needs neither.
"""

# Shape letters: N tokens, D model, F MLP features, H heads, K kv heads, E head dim, V vocabulary.

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import versions
from benchmarks.turns import settle
from benchmarks.workloads import SIZES, Size
from minilora.model.loss import CHUNK_ROWS, _cross_entropy
from minilora.model.rope import rotate, rotation
from minilora.model.swiglu import swiglu

TOKENS, TURNS = 2048, 30


@dataclass(frozen=True)
class Leaf:
    """A function as it is and its plain formula; inputs; calls per TOKENS tokens of a step.

    backward: False for one that runs without autograd.
    """

    name: str
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    calls: float
    backward: bool = True

    def __str__(self) -> str:
        return self.name

    def run(self, function: Callable[..., Any]) -> None:
        if not self.backward:
            function(*(x.clone() for x in self.inputs))
            return
        outputs = function(*self.inputs)
        torch.autograd.grad(outputs, self.inputs, [torch.ones_like(x) for x in outputs])


def leaves(size: Size, device: str, dtype: torch.dtype) -> list[Leaf]:
    """All that is worth the question, at the shapes of this size."""

    def numbers(*shape: int, grad: bool = True, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=of, requires_grad=grad)

    shape, norm = size.shape, numbers(size.hidden, grad=False)
    heads = (TOKENS, size.heads + size.kv_heads, shape.head_dim)
    positions = torch.arange(TOKENS, device=device)
    cos, sin = rotation(shape.rope, shape.head_dim, positions, dtype)
    targets = torch.randint(size.vocab, (CHUNK_ROWS, 1), device=device)

    def residual(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        total = x + y
        return total, F.rms_norm(total, (size.hidden,), norm, 1e-5)

    def plain_turn(x: Tensor) -> tuple[Tensor, ...]:
        first, second = x.chunk(2, -1)
        return (x * cos + torch.cat((-second, first), -1) * sin,)

    wide, model = (TOKENS, size.intermediate), (TOKENS, size.hidden)
    return [
        Leaf("SwiGLU", lambda g, u: (swiglu(g, u),), lambda g, u: (F.silu(g) * u,),
             (numbers(*wide), numbers(*wide)), size.layers),
        Leaf("rotary positions", lambda x: (rotate(x, (cos, sin)),), plain_turn,
             (numbers(*heads),), size.layers),
        Leaf("residual and norm", residual, residual, (numbers(*model), numbers(*model)),
             2 * size.layers),
        Leaf("cross-entropy", lambda x: _cross_entropy(x, targets),
             lambda x: _cross_entropy(x, targets),
             (numbers(CHUNK_ROWS, size.vocab, grad=False, of=torch.float32),),
             TOKENS / CHUNK_ROWS, backward=False),
    ]  # fmt: skip


def milliseconds(work: Callable[[], object], device: str) -> float:
    """One call of it, all kernels done."""
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def matmul_milliseconds(size: Size, device: str, dtype: torch.dtype) -> float:
    """What the frozen matrices take for TOKENS tokens, forward and backward, at a large matmul."""
    side = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    took = median(milliseconds(lambda: a @ b, device) for _ in range(5))
    return took * TOKENS * 4 * size.shape.matrix_elements / (2 * side**3)


def measured(leaf: Leaf, device: str, matmuls: float) -> dict[str, Any]:
    """In turns, so that a busy machine slows both alike."""
    compiled = torch.compile(leaf.plain)
    first = milliseconds(lambda: leaf.run(compiled), device)
    ways = {"ours": leaf.ours, "compiled": compiled}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, way in ways.items():
            times[name].append(milliseconds(lambda way=way: leaf.run(way), device))  # type: ignore[misc]
    ours, theirs = (median(found[5:]) for found in times.values())
    return {"leaf": leaf.name, "ours_ms": ours, "compiled_ms": theirs, "compiling_s": first / 1e3,
            "saved_of_matmuls": leaf.calls * (ours - theirs) / matmuls}  # fmt: skip


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.leaves", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES), default="mid")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    own = read(argv)
    dtype = torch.bfloat16 if own.device == "cuda" else torch.float32
    settle(own.device)
    if own.device == "cpu":
        torch.set_num_threads(1)
    size = SIZES[own.size]
    print(json.dumps({**versions(), "size": own.size, "device": own.device}), flush=True)
    matmuls = matmul_milliseconds(size, own.device, dtype)
    for leaf in leaves(size, own.device, dtype):
        print(json.dumps(measured(leaf, own.device, matmuls)), flush=True)


if __name__ == "__main__":
    main()
