"""What a GPU is asked to compute, traced where there is none: on torch's meta device.

Meta tensors have a shape, a dtype and a device, and take the way of a GPU's; only numbers are
missing. So every operation must exist with its backward, all must lie on one device, and whatever
would make the host wait for the GPU fails: it wants a number, or is a copy that blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.workloads import SIZES
from minilora.files.model_config import shape_from_config
from minilora.model.decode import CachedTile
from minilora.model.llama import Llama
from minilora.model.lora import inject, lora_parameters
from minilora.model.lora_shape import LoraShape
from minilora.model.tiles import document_tiles
from tests.support.models import TARGETS

META = torch.device("meta")
TILES = ((7, 5), (20,))
LENGTH = 32
# Name -> changes to the adapter, to config.json.
MODELS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "plain": ({}, {}),
    "DoRA": ({"use_dora": True}, {}),
    "tied": ({}, {"tie_word_embeddings": True}),
    "whole layers": ({"modules_to_save": ("embed_tokens", "lm_head")}, {}),
    "odd heads": ({}, {"head_dim": 100}),  # open_llama_3b's, which the varlen kernel does not take
}


class Trace(TorchDispatchMode):
    """The operations, each with all its tensors on one device, and no copy that blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
        assert len({x.device for x in given}) < 2, f"{func} of tensors on several devices"
        output = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and output.device != args[0].device:
            assert kwargs.get("non_blocking"), "a copy between host and GPU waits for the GPU"
        if func.name() == "torch_attn::_varlen_attn":
            _check_varlen(*args)
        self.names.add(func.name())
        return output


def _check_varlen(
    query: Tensor, key: Tensor, value: Tensor, begins: Tensor, ends: Tensor, *rest: Any
) -> None:
    """What mha_varlen_fwd asks for, in torch's flash_api.cpp."""
    assert query.shape[2] % 8 == 0 and query.shape[2] <= 256
    assert query.shape[1] % key.shape[1] == 0 and key.shape == value.shape
    assert {x.dtype for x in (query, key, value)} == {torch.bfloat16}
    assert {x.stride(-1) for x in (query, key, value)} == {1}
    for boundaries in (begins, ends):
        assert boundaries.dtype == torch.int32 and boundaries.is_contiguous()
    assert {type(longest) for longest in rest[:2]} == {int} and rest[2] is True


class Heads(TorchFunctionMode):
    """Notes the heads of the keys that SDPA is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.seen.add(args[1].shape[1])
        return func(*args, **kwargs or {})


def llama(dtype: torch.dtype, keep: int, name: str) -> Llama:
    adapter, changes = MODELS[name]
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with META:
            model = Llama(shape_from_config({**SIZES["tiny"].config(), **changes}), keep)
    finally:
        torch.set_default_dtype(default)
    inject(model, LoraShape(4, 8, 0.0, TARGETS, **adapter), seed=0)
    return model


def loss(model: Llama, piece: int | None = None) -> Tensor:
    like = torch.empty(0, dtype=model.model.norm.weight.dtype, device=META)
    tiles = document_tiles(model.shape, TILES, 0, like, piece)
    labels = torch.arange(LENGTH) - 3  # in host memory, as the engine gives them
    token_ids = torch.zeros(LENGTH, dtype=torch.int64, device=META)
    result: Tensor = model(token_ids, labels, tiles, 1.0)
    return result


@pytest.mark.parametrize(
    "name", ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in [*MODELS][1:])]
)
@pytest.mark.parametrize("piece", [None, 5])
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_stays_on_the_gpu(
    dtype: torch.dtype, keep: int, piece: int | None, name: str
) -> None:
    model = llama(dtype, keep, name)
    with Trace() as trace, Heads() as heads:
        total = loss(model, piece)
        total.backward()
    assert (total.shape, total.dtype, total.device) == ((), torch.float32, META)
    for parameter, tensor in lora_parameters(model):
        assert tensor.grad is not None, parameter
        found = (tensor.grad.shape, tensor.grad.dtype, tensor.grad.device)
        assert found == (tensor.shape, torch.float32, META), parameter
    varlen = dtype == torch.bfloat16 and name != "odd heads"
    kernels = {"torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"}
    assert trace.names & kernels == (kernels if varlen else set())
    # In fp32 no efficient kernel takes fewer heads of keys than of queries.
    assert heads.seen == (set() if varlen else {4 if dtype == torch.float32 else 2})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_validation_and_answers_stay_on_the_gpu(dtype: torch.dtype) -> None:
    model = llama(dtype, 0, "plain")
    with Trace(), torch.no_grad():
        scores = loss(model)
    assert (scores.shape, scores.dtype, scores.device) == ((2,), torch.float32, META)
    tile = CachedTile(model, [8, 9])
    for new in ([[1, 2, 3], [4]], [[5], [6]]):
        logits = tile.next_logits(new)
        assert (logits.shape, logits.dtype, logits.device) == ((2, 512), dtype, META)
