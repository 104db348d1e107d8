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
from minilora.model.lora_shape import MAGNITUDE, WHOLE, LoraLayer, LoraShape
from minilora.model.working_copies import WorkingCopies, working


class LoraLinear(nn.Module):
    """A linear layer that keeps its own frozen `weight` and gains lora_A (R, in), lora_B (out, R).

    The base parameter's name does not change. Input (N, in), output (N, out). The pair may be
    stored in fp32 beside a bf16 base: it is cast to the input's dtype, never the input to fp32.
    With DoRA (Liu et al. 2024, arXiv 2402.09353) there is lora_magnitude_vector (out,) too.
    """

    def __init__(
        self,
        base: Linear,
        layer: LoraLayer,
        seed: int,
        dtype: torch.dtype,
        dropout: SeededDropout | None,
    ) -> None:
        super().__init__()
        self.weight = base.weight
        self.matrix = base.matrix
        self.bias = base.bias
        self.scaling = layer.scaling
        self.dropout = dropout

        # Made in fp32 and then cast, so that every dtype starts from the same numbers, rounded.
        device = base.weight.device
        a = _kaiming_uniform(layer.rank, layer.in_features, seed)
        b = torch.zeros(layer.out_features, layer.rank)
        self.lora_A = nn.Parameter(a.to(device, dtype))
        self.lora_B = nn.Parameter(b.to(device, dtype))
        self.lora_magnitude_vector: nn.Parameter | None = None
        if layer.dora:
            ones = torch.ones(layer.out_features)  # to be set later, see `inject`
            self.lora_magnitude_vector = nn.Parameter(ones.to(device, dtype))

    def forward(self, x: Tensor, graph_only: bool = False) -> Tensor:
        """x: (N, in). Returns (N, out); graph_only: see `linear`."""
        dropped = None
        if self.dropout is not None and self.training:
            dropped = self.dropout(x)
        a = working(self.lora_A).to(x.dtype)
        b = working(self.lora_B).to(x.dtype)
        pair = LoraPair(a, b, self.scaling, dropped)
        if self.lora_magnitude_vector is None:
            return linear(x, self.matrix, self.bias, pair, graph_only)
        # The gradient of a magnitude needs the output that it scales: nothing can be left out.
        return self._forward_dora(x, pair, self.lora_magnitude_vector)

    def _forward_dora(self, x: Tensor, pair: LoraPair, magnitudes: Tensor) -> Tensor:
        """DoRA brings each row of W + scaling * B A to the length that is learned for it."""
        # As in PEFT, no gradient goes through the norms; section 4.3 of the paper suggests it.
        with torch.no_grad():
            norms = row_norms(self.matrix.numbers(x.dtype), pair.a, pair.b, pair.scaling)
        ratio = (magnitudes / norms).to(x.dtype)  # (out,)

        dropped = pair.dropped
        if dropped is None:
            output: Tensor = ratio * linear(x, self.matrix, None, pair)
            return output if self.bias is None else output + self.bias

        # As in PEFT, DoRA is for what dropout leaves of x; the rest takes the frozen weight alone.
        rest = linear(x - dropped, self.matrix, self.bias, None)
        adapted = linear(dropped, self.matrix, None, pair._replace(dropped=None))
        return torch.addcmul(rest, ratio, adapted)


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Norms of the rows of weight + scaling * B A, (out,) in fp32, without making that matrix.

    weight: (out, in); a: (R, in); b: (out, R). For a row w of the weight, b of B, and s = scaling:
    |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b.
    """
    own: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)  # (out,)
    crossed = (weight @ a.T).float()  # (out, R): A w for each row
    a = a.float()
    b = b.float()
    change = (b * (2 * scaling * crossed + scaling**2 * (b @ (a @ a.T)))).sum(1)  # (out,)
    # Rounding may bring a square below zero, and the norm is going to be divided by.
    return (own**2 + change).clamp_min_(torch.finfo(torch.float32).tiny).sqrt_()


def _kaiming_uniform(rank: int, in_features: int, seed: int) -> Tensor:
    """Uniform in +-1/sqrt(in), which is torch's kaiming_uniform_ with a = sqrt(5) as in PEFT."""
    generator = torch.Generator().manual_seed(seed)
    # torch.rand, because DeepSpeed's zero.Init turns the output of torch.empty into bf16.
    unit = torch.rand(rank, in_features, generator=generator, device="cpu", dtype=torch.float32)
    return (2 * unit - 1) / math.sqrt(in_features)


def inject(model: Llama, shape: LoraShape, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Freeze the model and put a LoraLinear in place of every targeted layer.

    Layers of `modules_to_save` are unfrozen again, to be trained as a whole. dtype: of the trained
    parameters. Each lora_A depends on the seed and its layer's name alone: it is the same on every
    rank, whatever the number of ranks. lora_B is zero, so the model computes what it did before.
    With DoRA it does once the magnitudes hold the norms of the weights' rows. They cannot be set
    here, where the weights may be partitioned, or not read yet.
    """
    model.requires_grad_(False)
    for name in shape.modules_to_save:
        weight = model.get_parameter(WHOLE[name])
        weight.requires_grad_()
        weight.data = weight.data.to(dtype)

    # One dropout per block, because a block starts the sequence of its masks with one seed.
    if shape.dropout:
        for block in model.model.layers:
            assert isinstance(block, Block)
            block.dropout = SeededDropout(shape.dropout)

    for path, layer in shape.layers(model.shape).items():
        # path: model.layers.INDEX.self_attn.q_proj, or the like
        parent_path, _, name = path.rpartition(".")
        index = int(path.split(".")[2])
        parent = model.get_submodule(parent_path)
        base = parent.get_submodule(name)
        block = model.model.layers[index]
        assert isinstance(base, Linear) and isinstance(block, Block)

        digest = hashlib.sha256(f"{seed} {index} {name}".encode()).digest()
        layer_seed = int.from_bytes(digest[:8], "little") >> 1  # 63 bits
        setattr(parent, name, LoraLinear(base, layer, layer_seed, dtype, block.dropout))


def lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters by name, in the model's order."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def copies_of_pairs(model: nn.Module, dtype: torch.dtype) -> WorkingCopies:
    """Copies of every lora_A and lora_B that has another dtype than this, which is computed in."""
    pairs = [
        parameter
        for name, parameter in lora_parameters(model)
        if name.endswith((".lora_A", ".lora_B")) and parameter.dtype != dtype
    ]
    return WorkingCopies(pairs, dtype)


def parameter_groups(model: nn.Module, ratio: float | None) -> list[dict[str, Any]]:
    """The trained parameters as groups of AdamW, each with the multiple of the learning rate.

    ratio: of LoRA+ (Hayou et al. 2024, arXiv 2402.12354), the multiple for every lora_B and, as in
    PEFT, for the vectors of DoRA; None for one learning rate.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in lora_parameters(model):
        multiple = 1.0
        if ratio is not None and name.endswith((".lora_B", MAGNITUDE)):
            multiple = ratio
        groups.setdefault(multiple, []).append(parameter)
    return [{"params": parameters, "ratio": multiple} for multiple, parameters in groups.items()]
