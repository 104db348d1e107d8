"""Recompute: the same gradients, exactly one more forward, and one saved input per block.

Blocks that save their activations give the same gradients. Plain autograd is the oracle of both.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minilora.model import recompute
from minilora.model.dropout import MaskPlace
from minilora.model.llama import Llama
from minilora.model.lora import lora_parameters
from minilora.model.tiles import MlpPiece, document_tiles
from tests.support.models import LENGTHS, adapted_llama, batch, gradients, tiles_of


def plain(dropout: float = 0.0) -> Llama:
    """The same model as autograd alone computes it: no function of ours around a block."""
    model = adapted_llama(0, dropout)
    for block in model.model.layers:

        def forward(hidden: Tensor, tiles: Any, block: Any = block) -> Tensor:
            return torch.cat([block._forward_tile(hidden[tile.rows], tile) for tile in tiles])

        block.forward = forward  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("keep", [0, 1, 2])
def test_gradients_are_bit_equal_to_autograds_in_one_tile(keep: int, dropout: float) -> None:
    expected = gradients(plain(dropout), [LENGTHS])
    found = gradients(adapted_llama(keep, dropout), [LENGTHS])
    for name, grad in expected.items():
        assert torch.equal(grad, found[name]), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_blocks_changes_no_bit_over_several_tiles(
    dropout: float, dtype: torch.dtype
) -> None:
    tiles = [LENGTHS[:1], LENGTHS[1:3], LENGTHS[3:]]
    recomputed = gradients(adapted_llama(0, dropout, dtype), tiles)
    saving = [block.saves_activations for block in adapted_llama(1).model.layers]
    assert saving == [False, True], "the last ones"
    for keep in (1, 2):
        for name, grad in gradients(adapted_llama(keep, dropout, dtype), tiles).items():
            assert torch.equal(grad, recomputed[name]), name
    if dtype == torch.float32:
        for name, grad in gradients(plain(dropout), tiles).items():
            scale = float(grad.abs().max())
            torch.testing.assert_close(recomputed[name], grad, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_parameters_gradient_arrives_once_however_many_tiles(keep: int) -> None:
    """DeepSpeed reduces a gradient when it arrives; a second one would come too late."""
    model = adapted_llama(keep)
    arrived: list[str] = []
    for name, parameter in lora_parameters(model):
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    gradients(model, [(length,) for length in LENGTHS])
    assert sorted(arrived) == sorted(name for name, _ in lora_parameters(model))


class Everything(nullcontext):
    """All operations count as one module's."""

    parents = frozenset({"Global"})


@pytest.mark.slow
def test_exactly_one_more_forward_but_for_its_last_product_by_flops() -> None:
    tiles = [LENGTHS[:2], LENGTHS[2:]]

    def flops(keep: int, backward: bool, piece: int | None = None) -> int:
        model = adapted_llama(keep)
        hidden = torch.randn(sum(LENGTHS), 32, requires_grad=True)
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = Everything()  # torch's own one cannot follow modules under no_grad
        with counter:
            for block in model.model.layers:
                hidden = block(hidden, document_tiles(model.shape, tiles, 0, hidden, piece))
            if backward:
                hidden.sum().backward()
        return counter.get_total_flops()

    forward = flops(0, backward=False)
    assert forward == flops(2, backward=False) > 0
    # Nobody reads what down_proj would give when a block is recomputed: 48 features to 32.
    skipped = 2 * 2 * sum(LENGTHS) * 48 * 32
    recomputed = forward - skipped
    assert flops(0, backward=True) == flops(2, backward=True) + recomputed
    assert flops(1, backward=True) == flops(2, backward=True) + recomputed // 2
    assert flops(0, backward=True, piece=8) == flops(0, backward=True)


@pytest.mark.parametrize("tiles", [[LENGTHS], [(length,) for length in LENGTHS]])
def test_one_block_input_per_block_is_all_that_is_kept(tiles: list[tuple[int, ...]]) -> None:
    model = adapted_llama()
    saved: list[Tensor] = []
    token_ids, _ = batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        hidden = model.model(token_ids, tiles_of(model, *tiles))
    assert [tuple(tensor.shape) for tensor in saved] == [(sum(LENGTHS), 32)] * 2
    assert hidden.requires_grad


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_blocks_input_goes_with_its_backward(keep: int) -> None:
    """Though the loss, and with it the whole graph, is still held."""
    model = adapted_llama(keep)
    inputs: list[Any] = []
    for block in model.model.layers:
        block.register_forward_pre_hook(
            lambda _, args: inputs.append(weakref.ref(args[0].untyped_storage()))
        )
    loss = model(*batch(), tiles_of(model, LENGTHS[:2], LENGTHS[2:]), 1.0)
    assert inputs[1]() is not None
    loss.backward()
    assert inputs[1]() is None


def test_frozen_parameters_get_no_gradient() -> None:
    model = adapted_llama()
    gradients(model, [LENGTHS])
    trained = {name for name, _ in lora_parameters(model)}
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)


@pytest.mark.parametrize("run", [recompute.recompute, recompute.save_activations])
def test_bf16_tiles_sum_in_fp32(run: Any) -> None:
    """600 tiles with a gradient of 1 each: in bf16 256 + 1 is 256."""
    hidden = torch.ones(600, 4, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    tiles = [MlpPiece(slice(at, at + 1), MaskPlace(0)) for at in range(600)]
    run(lambda x, tile: x * weight, hidden, tiles, [weight]).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [600.0] * 4


@pytest.mark.parametrize("run", [recompute.recompute, recompute.save_activations])
def test_only_recompute_asks_for_the_graph_alone_and_only_in_backward(run: Any) -> None:
    calls: list[bool] = []

    def body(x: Tensor, tile: MlpPiece) -> Tensor:
        calls.append(tile.graph_only)
        return x * 2

    hidden = torch.ones(6, 4, requires_grad=True)
    tiles = [MlpPiece(slice(at, at + 3), MaskPlace(0)) for at in (0, 3)]
    output = run(body, hidden, tiles, [])
    assert calls == [False, False] and torch.equal(output, hidden * 2)
    output.sum().backward()
    again = [True, True] if run is recompute.recompute else []
    assert calls == [False, False, *again]
    assert hidden.grad is not None and hidden.grad.eq(2).all()


def test_rows_that_are_for_the_graph_alone_are_not_computed_in_forward() -> None:
    """So are the pieces of a tile that is being recomputed."""
    calls: list[slice] = []

    def body(x: Tensor, tile: MlpPiece) -> Tensor:
        calls.append(tile.rows)
        return x * 2

    hidden = torch.ones(6, 4, requires_grad=True)
    tiles = [MlpPiece(slice(at, at + 3), MaskPlace(0), graph_only=True) for at in (0, 3)]
    output = recompute.recompute(body, hidden, tiles, [])
    assert calls == []
    output.sum().backward()
    assert calls == [tile.rows for tile in tiles]
    assert hidden.grad is not None and hidden.grad.eq(2).all()
