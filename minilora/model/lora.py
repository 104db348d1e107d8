"""LoRA by hand (Hu et al. 2021, arXiv 2106.09685): W x + scaling * B A x, W frozen."""

# Shape letters: N tokens, R rank; `in` and `out` are a linear layer's features.

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minilora.config import RequestError
from minilora.model.dropout import SeededDropout
from minilora.model.linear import Pair, linear
from minilora.model.llama import Block, Linear, Llama
from minilora.model.shape import LlamaShape


@dataclass(frozen=True)
class LoraShape:
    """What an adapter adds: rank R, scaling alpha / R, dropout in [0, 1), and to which layers."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def parameter_shapes(self, model: LlamaShape) -> dict[str, tuple[int, int]]:
        """Every trained parameter by its name in the model, in the model's order."""
        shapes = {}
        for name, shape in model.parameter_shapes().items():
            module, _, kind = name.rpartition(".")
            if module.rpartition(".")[2] in self.targets and kind == "weight":
                shapes[f"{module}.lora_A"] = (self.rank, shape[1])
                shapes[f"{module}.lora_B"] = (shape[0], self.rank)
        return shapes

    def size(self, model: LlamaShape) -> int:
        """Elements of all trained parameters."""
        return sum(rows * columns for rows, columns in self.parameter_shapes(model).values())


class LoraLinear(nn.Module):
    """A linear layer that keeps its own frozen `weight` and gains lora_A (R, in), lora_B (out, R).

    The base parameter's name does not change. Input (N, in), output (N, out). The pair may be kept
    in fp32 beside a bf16 base: it is cast to the input's dtype, never the input to fp32.
    """

    def __init__(
        self,
        base: Linear,
        shape: LoraShape,
        seed: int,
        dtype: torch.dtype,
        dropout: SeededDropout | None,
    ) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.scaling = shape.scaling
        self.dropout = dropout
        a = _kaiming_uniform(shape.rank, base.in_features, seed)
        b = torch.zeros(base.out_features, shape.rank)
        self.lora_A = nn.Parameter(a.to(base.weight.device, dtype))
        self.lora_B = nn.Parameter(b.to(base.weight.device, dtype))

    def forward(self, x: Tensor, unread: bool = False) -> Tensor:
        dropped = self.dropout(x) if self.dropout is not None and self.training else None
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return linear(x, self.weight, self.bias, Pair(a, b, self.scaling, dropped), unread)


def _kaiming_uniform(rank: int, in_features: int, seed: int) -> Tensor:
    """Uniform in +-1/sqrt(in), which is torch's kaiming_uniform_ with a = sqrt(5) as in PEFT."""
    generator = torch.Generator().manual_seed(seed)
    # torch.rand, because DeepSpeed's zero.Init turns the output of torch.empty into bf16.
    unit = torch.rand(rank, in_features, generator=generator, device="cpu", dtype=torch.float32)
    return (2 * unit - 1) / math.sqrt(in_features)


def resolve_targets(lora_target: str | Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The linear layers that `lora_target` names, in the model's order; `all` is every one.

    Raises RequestError for a name that matches nothing.
    """
    named = [lora_target] if isinstance(lora_target, str) else list(lora_target)
    if "all" in named:
        return tuple(known)
    wrong = [name for name in named if name not in known]
    if wrong or not named:
        raise RequestError(
            [f"lora_target: no layer is called {name}; known: {', '.join(known)}" for name in wrong]
            or ["lora_target: names no layer; write `all` or a list"]
        )
    return tuple(name for name in known if name in named)


def inject(model: Llama, shape: LoraShape, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Freeze the model and put a LoraLinear in place of every linear layer that is targeted.

    dtype: of the new parameters.

    Each lora_A depends on the seed and its layer's name alone: the same on every rank, whatever
    the number of ranks. lora_B is zero, so the model computes what it did before.
    """
    model.requires_grad_(False)
    for index, block in enumerate(model.model.layers):
        assert isinstance(block, Block)
        if shape.dropout:
            block.dropout = SeededDropout(shape.dropout)
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, Linear) and name in shape.targets:
                    digest = hashlib.sha256(f"{seed} {index} {name}".encode()).digest()
                    layer_seed = int.from_bytes(digest[:8], "little") >> 1
                    layer = LoraLinear(child, shape, layer_seed, dtype, block.dropout)
                    setattr(parent, name, layer)


def lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters by name, in the model's order."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
