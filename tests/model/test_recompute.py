"""Recompute: the same gradients, exactly one more forward, and one saved input per block.

Blocks that keep their activations give the same gradients. Plain autograd is the oracle of both.
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
from minilora.model.dropout import SeededDropout
from minilora.model.llama import Llama
from minilora.model.lora import inject, lora_parameters
from minilora.model.lora_shape import LoraShape
from minilora.model.offload import HostStore
from minilora.model.tiles import MlpPiece, document_tiles
from tests.support.models import ours, random_llama, tiles_of

LENGTHS = (7, 20, 5, 11, 3)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(keep: int, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Llama:
    """Two blocks, of which the last `keep` keep their activations."""
    model = ours(random_llama(), keep)
    inject(model, LoraShape(4, 8, dropout, TARGETS), seed=0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in lora_parameters(model):
        if name.endswith("lora_B"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.to(dtype)


def plain(dropout: float = 0.0) -> Llama:
    """The same model as autograd alone computes it: no function of ours around a block."""
    model = llama(0, dropout)
    for block in model.model.layers:

        def forward(hidden: Tensor, tiles: Any, block: Any = block) -> Tensor:
            return torch.cat([block._forward_tile(hidden[tile.rows], tile) for tile in tiles])

        block.forward = forward  # type: ignore[method-assign]
    return model


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    token_ids = torch.randint(0, 128, (sum(LENGTHS),), generator=generator)
    return token_ids, torch.where(torch.arange(len(token_ids)) % 3 > 0, token_ids.roll(-1), -100)


def gradients(model: Llama, tiles: list[tuple[int, ...]]) -> dict[str, Tensor]:
    token_ids, labels = batch()
    dtype = model.lm_head.weight.dtype
    laid_out = document_tiles(model.shape, tiles, 0, torch.empty(0, dtype=dtype))
    model(token_ids, labels, laid_out, 1.0).backward()
    found = {name: parameter.grad for name, parameter in lora_parameters(model)}
    assert all(grad is not None and grad.any() for grad in found.values())
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("keep", [0, 1, 2])
def test_gradients_are_bit_equal_to_autograds_in_one_tile(keep: int, dropout: float) -> None:
    expected, found = (
        gradients(plain(dropout), [LENGTHS]),
        gradients(llama(keep, dropout), [LENGTHS]),
    )
    for name, grad in expected.items():
        assert torch.equal(grad, found[name]), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_blocks_changes_no_bit_over_several_tiles(
    dropout: float, dtype: torch.dtype
) -> None:
    tiles = [LENGTHS[:1], LENGTHS[1:3], LENGTHS[3:]]
    again = gradients(llama(0, dropout, dtype), tiles)
    assert [block.keep for block in llama(1).model.layers] == [False, True], "the last ones"
    for keep in (1, 2):
        for name, grad in gradients(llama(keep, dropout, dtype), tiles).items():
            assert torch.equal(grad, again[name]), name
    if dtype == torch.float32:
        for name, grad in gradients(plain(dropout), tiles).items():
            torch.testing.assert_close(
                again[name], grad, rtol=1e-5, atol=1e-6 * float(grad.abs().max())
            )


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_parameters_gradient_arrives_once_however_many_tiles(keep: int) -> None:
    """DeepSpeed reduces a gradient when it arrives; a second one would come too late."""
    model, arrived = llama(keep), list[str]()
    for name, parameter in lora_parameters(model):
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    gradients(model, [(length,) for length in LENGTHS])
    assert sorted(arrived) == sorted(name for name, _ in lora_parameters(model))


def test_any_tiling_gives_the_same_gradients() -> None:
    one = gradients(llama(0), [LENGTHS])
    for tiles in ([(length,) for length in LENGTHS], [LENGTHS[:2], LENGTHS[2:]]):
        other = gradients(llama(0), tiles)
        for name, grad in one.items():
            scale = float(grad.abs().max())
            torch.testing.assert_close(other[name], grad, rtol=1e-6, atol=1e-6 * scale)


def test_dropout_drops_with_the_stated_probability_and_repeats_itself() -> None:
    dropout = SeededDropout(0.25)
    x = torch.ones(100, 400)
    dropout.reseed(7, x.device)
    first, second = dropout(x), dropout(x)
    dropout.reseed(7, x.device)
    assert torch.equal(dropout(x), first) and not torch.equal(first, second)
    assert first.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert abs(float((first == 0).float().mean()) - 0.25) < 0.01


def test_dropout_masks_differ_between_blocks_tiles_and_spans() -> None:
    seeds: list[int] = []
    model = llama(0, 0.3)
    for block in model.model.layers:
        block.dropout.reseed = lambda seed, device: seeds.append(seed)  # type: ignore[method-assign]
    token_ids, labels = batch()
    for span_seed in (0, 1):
        limits = {"like": torch.empty(0), "piece_tokens": 3}
        tiles = document_tiles(model.shape, [LENGTHS[:2], LENGTHS[2:]], span_seed, **limits)
        with torch.no_grad():
            model(token_ids, labels, tiles, 1.0)
    # In every block of both spans: for the attention of 2 tiles, and for their 9 + 7 pieces of MLP.
    assert len(seeds) == len(set(seeds)) == 2 * (2 + 16) * len(model.model.layers)


def test_evaluation_drops_nothing() -> None:
    with_dropout, without = llama(0, 0.5).eval(), llama(0)
    token_ids, labels = batch()
    with torch.no_grad():
        losses = [m(token_ids, labels, tiles_of(m, LENGTHS), 1.0) for m in (with_dropout, without)]
    assert torch.equal(*losses)


class Everything(nullcontext):
    """All operations count as one module's."""

    parents = frozenset({"Global"})


def test_exactly_one_more_forward_but_for_its_last_product_by_flops() -> None:
    tiles = [LENGTHS[:2], LENGTHS[2:]]

    def flops(keep: int, backward: bool, piece: int | None = None) -> int:
        model = llama(keep)
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
    # Nobody reads what down_proj would give when a block is computed again: 48 features to 32.
    unread = 2 * 2 * sum(LENGTHS) * 48 * 32
    again = forward - unread
    assert flops(0, backward=True) == flops(2, backward=True) + again
    assert flops(1, backward=True) == flops(2, backward=True) + again // 2
    assert flops(0, backward=True, piece=8) == flops(0, backward=True)


@pytest.mark.parametrize("tiles", [[LENGTHS], [(length,) for length in LENGTHS]])
def test_one_block_input_per_block_is_all_that_is_kept(tiles: list[tuple[int, ...]]) -> None:
    model = llama(0)
    kept: list[Tensor] = []
    token_ids, labels = batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        hidden = model.model(token_ids, tiles_of(model, *tiles))
    assert [tuple(tensor.shape) for tensor in kept] == [(sum(LENGTHS), 32)] * 2
    assert hidden.requires_grad


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_blocks_input_goes_with_its_backward(keep: int) -> None:
    """Though the loss, and with it the whole graph, is still held."""
    model, inputs = llama(keep), list[Any]()
    for block in model.model.layers:
        block.register_forward_pre_hook(
            lambda _, args: inputs.append(weakref.ref(args[0].untyped_storage()))
        )
    loss = model(*batch(), tiles_of(model, LENGTHS[:2], LENGTHS[2:]), 1.0)
    assert inputs[1]() is not None
    loss.backward()
    assert inputs[1]() is None


def test_frozen_parameters_get_no_gradient() -> None:
    model = llama(0)
    gradients(model, [LENGTHS])
    trained = {name for name, _ in lora_parameters(model)}
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)


@pytest.mark.parametrize("run", [recompute.recompute, recompute.keep])
def test_bf16_tiles_sum_in_fp32(run: Any) -> None:
    """600 tiles with a gradient of 1 each: in bf16 256 + 1 is 256."""
    hidden = torch.ones(600, 4, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    tiles = [MlpPiece(slice(at, at + 1), 0) for at in range(600)]
    run(lambda x, tile, unread=False: x * weight, hidden, tiles, [weight]).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [600.0] * 4


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_long_document_in_pieces_gives_the_same_gradients(dropout: float) -> None:
    """A tile whose MLP walks pieces of 8 rows, with and without keeping the activations."""
    token_ids, labels = batch()

    def found(keep: int, piece_tokens: int | None) -> dict[str, Tensor]:
        model = llama(keep, dropout)
        like = torch.empty(0)
        tiles = document_tiles(model.shape, [(len(token_ids),)], 0, like, piece_tokens)
        model(token_ids, labels, tiles, 1.0).backward()
        return {name: parameter.grad for name, parameter in lora_parameters(model)}

    whole = found(0, 8 if dropout else None)
    for keep in (0, 1, 2):
        for name, grad in found(keep, 8).items():
            scale = float(whole[name].abs().max())
            torch.testing.assert_close(grad, whole[name], rtol=1e-6, atol=1e-6 * scale)


def test_a_long_document_in_pieces_never_has_the_whole_mlp_in_memory() -> None:
    """The widest tensor of the MLP has a piece's rows, in forward and in backward."""
    model, widest = llama(0), [0]
    for block in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            layer = getattr(block.mlp, name)
            layer.register_forward_hook(
                lambda *args: widest.append(args[2].shape[0])  # rows of the output
            )
    token_ids, labels = batch()
    tiles = document_tiles(model.shape, [(len(token_ids),)], 0, torch.empty(0), 8)
    model(token_ids, labels, tiles, 1.0).backward()
    assert max(widest) == 8 < len(token_ids)


@pytest.mark.parametrize("keep", [0, 1])
def test_inputs_in_host_memory_change_no_bit(keep: int) -> None:
    kept = gradients(llama(0, 0.3), [LENGTHS[:2], LENGTHS[2:]])
    model = llama(keep, 0.3)
    model.model.offload_inputs()
    for _ in range(2):  # the store is empty again after each step
        for _, parameter in lora_parameters(model):
            parameter.grad = None
        for name, grad in gradients(model, [LENGTHS[:2], LENGTHS[2:]]).items():
            assert torch.equal(grad, kept[name]), name
    store = model.model.layers[0].store
    assert store is model.model.layers[1].store and store.held == [] and store.ahead is None


def test_the_host_gives_back_the_last_first() -> None:
    store, hidden = HostStore(), [torch.full((2, 3), float(number)) for number in range(4)]
    places = [store.put(tensor) for tensor in hidden]
    for place, tensor in reversed([*zip(places, hidden, strict=True)]):
        assert torch.equal(store.take(place, like=tensor), tensor)


def test_inputs_in_host_memory_are_not_kept_twice() -> None:
    model, kept = llama(0), []
    model.model.offload_inputs()
    token_ids, labels = batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.model(token_ids, tiles_of(model, LENGTHS))
    assert kept == []
    assert [tuple(host.shape) for host in model.model.layers[0].store.held] == [(46, 32)] * 2
