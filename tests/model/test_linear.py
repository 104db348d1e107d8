"""The hand-written backward of a linear layer with LoRA against autograd's, elementwise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minilora.model.linear import LoraPair, linear
from minilora.model.matrix import Matrix


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, pair: LoraPair | None) -> Tensor:
    """The equation as it stands."""
    output = F.linear(x, weight, bias)
    if pair is None:
        return output
    low_input = x if pair.dropped is None else pair.dropped
    return output + pair.scaling * (low_input @ pair.a.T @ pair.b.T)


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    sizes = {"x": (9, 6), "dropped": (9, 6), "weight": (5, 6), "bias": (5,), "a": (3, 6)}
    made = {name: torch.randn(size, dtype=dtype) for name, size in sizes.items()}
    return {**made, "b": torch.randn(5, 3, dtype=dtype)}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("kind", ["frozen", "pair", "dropout"])
@pytest.mark.parametrize("graph_only", [False, True], ids=["", "graph_only"])
def test_output_and_gradients_equal_autograds(kind: str, bias: bool, graph_only: bool) -> None:
    made = inputs(torch.float64)
    wanted = {"frozen": ["x"], "pair": ["x", "a", "b"], "dropout": ["x", "a", "b", "dropped"]}[kind]
    for name in wanted:
        made[name].requires_grad_()
    dropped = made["dropped"] if kind == "dropout" else None
    pair = None if kind == "frozen" else LoraPair(made["a"], made["b"], 1.7, dropped)
    x, weight, used_bias = made["x"], made["weight"], made["bias"] if bias else None
    mine = linear(x, Matrix(weight), used_bias, pair, graph_only)
    expected = plain(x, weight, used_bias, pair)
    if not graph_only:
        torch.testing.assert_close(mine, expected)
    grad = torch.randn_like(expected)
    leaves = [made[name] for name in wanted]
    found = torch.autograd.grad(mine, leaves, grad)
    for name, mine_grad, their_grad in zip(
        wanted, found, torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(mine_grad, their_grad, msg=lambda text, n=name: f"{n}: {text}")


def test_an_input_without_gradient_costs_no_product_and_gets_none() -> None:
    made = inputs(torch.float64)
    made["a"].requires_grad_()
    made["b"].requires_grad_()
    pair = LoraPair(made["a"], made["b"], 2.0, None)
    output = linear(made["x"], Matrix(made["weight"]), None, pair)
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    # Of 9 rows, with 5 outputs, 6 inputs and rank 3: B^T g, and the products with x and with A x.
    assert counter.get_total_flops() == 2 * 9 * 3 * (5 + 6 + 5)
    assert made["x"].grad is None and made["weight"].grad is None
    torch.testing.assert_close(made["b"].grad, 2.0 * (made["x"] @ made["a"].T).sum(0).repeat(5, 1))


def test_bf16_is_within_its_rounding_of_fp64() -> None:
    made = {name: tensor.bfloat16() for name, tensor in inputs(torch.float32).items()}
    exact = {name: tensor.double() for name, tensor in made.items()}
    for group in (made, exact):
        for name in ("x", "a", "b"):
            group[name].requires_grad_()
    mine, theirs = (LoraPair(group["a"], group["b"], 0.5, None) for group in (made, exact))
    outputs = [
        linear(made["x"], Matrix(made["weight"]), made["bias"], mine),
        plain(exact["x"], exact["weight"], exact["bias"], theirs),
    ]
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=2e-2, atol=6e-2)
    for output in outputs:
        output.sum().backward()
    for name in ("x", "a", "b"):
        torch.testing.assert_close(made[name].grad.double(), exact[name].grad, rtol=2e-2, atol=0.2)
