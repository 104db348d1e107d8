"""LoRA layers: how they start, what they are put in place of, and DoRA against PEFT's layer."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from minilora.model.llama import Linear
from minilora.model.lora import (
    LoraLinear,
    inject,
    lora_parameters,
    parameter_groups,
    row_norms,
)
from minilora.model.lora_shape import LoraLayer, LoraShape
from tests.support.models import TARGETS, ours, random_llama, tiles_of


def test_injection_changes_no_output_and_no_name() -> None:
    model = ours(random_llama())
    names = {name for name, _ in model.named_parameters()}
    ids = torch.randint(0, 128, (20,))
    with torch.no_grad():
        before = model.logits(ids, tiles_of(model, (20,)))
        inject(model, LoraShape(4, 8, 0.0, ("q_proj", "down_proj")), seed=0)
        after = model.logits(ids, tiles_of(model, (20,)))
    assert torch.equal(before, after)
    added = {name for name, _ in model.named_parameters()} - names
    assert names < {name for name, _ in model.named_parameters()}
    assert added == {
        f"model.layers.{layer}.{module}.lora_{ab}"
        for layer in (0, 1)
        for module in ("self_attn.q_proj", "mlp.down_proj")
        for ab in "AB"
    }
    assert {name for name, p in model.named_parameters() if p.requires_grad} == added


def test_lora_a_is_kaiming_uniform_and_depends_on_seed_and_name_alone() -> None:
    def start(seed: int, **changes: object) -> dict[str, Tensor]:
        model = ours(random_llama(hidden_size=256, **changes))
        inject(model, LoraShape(8, 16, 0.0, TARGETS), seed)
        return {name: parameter.data for name, parameter in lora_parameters(model)}

    first, second, other = start(3), start(3, num_hidden_layers=1), start(4)
    for name, tensor in second.items():
        assert torch.equal(tensor, first[name])
    a = first["model.layers.0.self_attn.q_proj.lora_A"]
    bound = 256**-0.5
    assert 0.98 * bound < a.abs().max() <= bound and abs(a.mean()) < 0.05 * bound
    assert not torch.equal(a, other["model.layers.0.self_attn.q_proj.lora_A"])
    assert not torch.equal(a, first["model.layers.1.self_attn.q_proj.lora_A"])
    assert not torch.equal(a[:, :32], first["model.layers.0.self_attn.k_proj.lora_A"][:, :32])
    assert all(not tensor.any() for name, tensor in first.items() if name.endswith("lora_B"))


def test_only_targeted_layers_become_lora() -> None:
    model = ours(random_llama())
    inject(model, LoraShape(2, 4, 0.0, ("v_proj",)), seed=0)
    found = {name for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    assert found == {"model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"}


def test_lora_plus_is_for_lora_b_and_as_in_peft_for_vectors() -> None:
    model = ours(random_llama())
    inject(model, LoraShape(2, 4, 0.0, ("q_proj",), use_dora=True), seed=0)
    names = {parameter: name for name, parameter in lora_parameters(model)}

    def kinds(ratio: float | None) -> dict[float, set[str]]:
        return {
            group["ratio"]: {names[parameter].rpartition(".")[2] for parameter in group["params"]}
            for group in parameter_groups(model, ratio)
        }

    assert kinds(None) == {1.0: {"lora_A", "lora_B", "lora_magnitude_vector"}}
    assert kinds(4.0) == {1.0: {"lora_A"}, 4.0: {"lora_B", "lora_magnitude_vector"}}


class SameMask(nn.Module):
    """Instead of PEFT's dropout: what ours makes of the input."""

    def __init__(self, dropped: Tensor) -> None:
        super().__init__()
        self.dropped = dropped

    def forward(self, x: Tensor) -> Tensor:
        return self.dropped


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_dora_drops_what_peft_drops(bias: bool) -> None:
    base = nn.Sequential()
    base.add_module("q_proj", nn.Linear(12, 7, bias))
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj"], use_dora=True, lora_dropout=0.5
    )
    theirs = get_peft_model(base, config).base_model.model.q_proj
    x = torch.randn(9, 12, requires_grad=True)
    same = SameMask(x * torch.bernoulli(torch.full_like(x, 0.5)) * 2)
    theirs.lora_dropout["default"] = same
    plain = Linear(7, 12, bias)
    plain.load_state_dict(theirs.base_layer.state_dict())
    mine = LoraLinear(plain, LoraLayer(7, 12, 3, 5 / 3, True), 0, torch.float32, same)
    found = dict(theirs.named_parameters())
    trained = []
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        parameter = found[f"{name}.default.weight"]
        parameter.data = torch.randn_like(parameter)
        mine.get_parameter(name).data.copy_(parameter.data)
        trained.append((mine.get_parameter(name), parameter))
    torch.testing.assert_close(mine(x), theirs(x))
    grad = torch.randn(9, 7)
    grads = (
        torch.autograd.grad(layer(x), [x, *leaves], grad, retain_graph=True)
        for layer, leaves in zip((mine, theirs), zip(*trained, strict=True), strict=True)
    )
    for ours_, peft in zip(*grads, strict=True):
        torch.testing.assert_close(ours_, peft)


def test_norms_of_rows_are_those_of_the_matrix_that_is_not_made() -> None:
    weight, a, b = torch.randn(6, 9), torch.randn(2, 9), torch.randn(6, 2)
    exact = (weight.double() + 1.7 * b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(row_norms(weight, a, b, 1.7).double(), exact, rtol=1e-6, atol=0)
    low = [tensor.bfloat16() for tensor in (weight, a, b)]
    near = (low[0].double() + 1.7 * low[2].double() @ low[1].double()).norm(dim=1)
    assert (row_norms(*low, 1.7).dtype, low[0].dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(row_norms(*low, 1.7).double(), near, rtol=5e-3, atol=0)
    zero = row_norms(torch.zeros(6, 9), a, torch.zeros(6, 2), 1.7)
    assert ((zero > 0) & (zero < 1e-15)).all(), "0 / 0 would be no number"
