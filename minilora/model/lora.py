"""LoRA by hand (Hu et al. 2021, arXiv 2106.09685): W x + scaling * B A x, W frozen."""

# Shape letters: N tokens, R rank; `in` and `out` are a linear layer's features.

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minilora.model.dropout import SeededDropout
from minilora.model.linear import LoraPair, linear
from minilora.model.llama import Block, Linear, Llama
from minilora.model.lora_shape import MAGNITUDE, WHOLE, Layer, LoraShape


class LoraLinear(nn.Module):
    """A linear layer that keeps its own frozen `weight` and gains lora_A (R, in), lora_B (out, R).

    The base parameter's name does not change. Input (N, in), output (N, out). The pair may be kept
    in fp32 beside a bf16 base: it is cast to the input's dtype, never the input to fp32.
    With DoRA there is lora_magnitude_vector (out,) too, which starts as the norms of the rows.
    """

    def __init__(
        self, base: Linear, layer: Layer, seed: int, dtype: torch.dtype,
        dropout: SeededDropout | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.scaling = layer.scaling
        self.dropout = dropout
        a = _kaiming_uniform(layer.rank, layer.in_features, seed)
        b = torch.zeros(layer.out_features, layer.rank)
        self.lora_A = nn.Parameter(a.to(base.weight.device, dtype))
        self.lora_B = nn.Parameter(b.to(base.weight.device, dtype))
        ones = torch.ones(layer.out_features).to(base.weight.device, dtype)
        self.lora_magnitude_vector = nn.Parameter(ones) if layer.dora else None

    def forward(self, x: Tensor, unread: bool = False) -> Tensor:
        dropped = self.dropout(x) if self.dropout is not None and self.training else None
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        if self.lora_magnitude_vector is None:
            return linear(x, self.weight, self.bias, LoraPair(a, b, self.scaling, dropped), unread)
        # DoRA: each row of W + scaling * B A is brought to the length that is learned for it.
        with torch.no_grad():  # PEFT lets no gradient through the norms, as the paper suggests
            norms = row_norms(self.weight, a, b, self.scaling)
        ratio = (self.lora_magnitude_vector / norms).to(x.dtype)
        pair = LoraPair(a, b, self.scaling, None)
        if dropped is None:
            output: Tensor = ratio * linear(x, self.weight, None, pair)
            return output if self.bias is None else output + self.bias
        # As in PEFT, what was dropped still goes through the frozen weight.
        rest = linear(x - dropped, self.weight, self.bias, None)
        return torch.addcmul(rest, ratio, linear(dropped, self.weight, None, pair))


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Norms of the rows of weight + scaling * B A, (out,) in fp32, without making that matrix.

    weight: (out, in); a: (R, in); b: (out, R). For a row w of the weight and b of B:
    |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b.
    """
    own: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    crossed, a, b = (weight @ a.T).float(), a.float(), b.float()
    change = (b * (2 * scaling * crossed + scaling**2 * (b @ (a @ a.T)))).sum(1)
    return (own**2 + change).clamp_min_(torch.finfo(torch.float32).tiny).sqrt_()


def _kaiming_uniform(rank: int, in_features: int, seed: int) -> Tensor:
    """Uniform in +-1/sqrt(in), which is torch's kaiming_uniform_ with a = sqrt(5) as in PEFT."""
    generator = torch.Generator().manual_seed(seed)
    # torch.rand, because DeepSpeed's zero.Init turns the output of torch.empty into bf16.
    unit = torch.rand(rank, in_features, generator=generator, device="cpu", dtype=torch.float32)
    return (2 * unit - 1) / math.sqrt(in_features)


def inject(model: Llama, shape: LoraShape, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Freeze the model, put a LoraLinear in place of every targeted layer, free what is whole.

    dtype: of the trained parameters.

    Each lora_A depends on the seed and its layer's name alone: the same on every rank, whatever
    the number of ranks. lora_B is zero, so the model computes what it did before, with DoRA once
    its magnitudes are set: they cannot be here, where weights may be partitioned or yet to read.
    """
    model.requires_grad_(False)
    for name in shape.modules_to_save:
        weight = model.get_parameter(WHOLE[name]).requires_grad_()
        weight.data = weight.data.to(dtype)
    layers = shape.layers(model.shape)
    for index, block in enumerate(model.model.layers):
        assert isinstance(block, Block)
        if shape.dropout:
            block.dropout = SeededDropout(shape.dropout)
        for part in ("self_attn", "mlp"):
            for name, child in list(getattr(block, part).named_children()):
                layer = layers.get(f"model.layers.{index}.{part}.{name}")
                if layer is not None:
                    digest = hashlib.sha256(f"{seed} {index} {name}".encode()).digest()
                    layer_seed = int.from_bytes(digest[:8], "little") >> 1
                    lora = LoraLinear(child, layer, layer_seed, dtype, block.dropout)
                    setattr(getattr(block, part), name, lora)


def lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters by name, in the model's order."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def parameter_groups(model: nn.Module, ratio: float | None) -> list[dict[str, Any]]:
    """What the optimizer trains, and at which multiple (`ratio`) of the learning rate.

    ratio: LoRA+ (Hayou et al. 2024, arXiv 2402.12354): of each lora_B, and as in PEFT of vectors.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in lora_parameters(model):
        fast = name.endswith((".lora_B", MAGNITUDE))
        groups.setdefault(ratio if ratio and fast else 1.0, []).append(parameter)
    return [{"params": parameters, "ratio": times} for times, parameters in groups.items()]
