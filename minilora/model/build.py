"""Make a model whose numbers are still to be read: the right dtypes, in the right place."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from minilora.model.llama import Llama
from minilora.model.llama_shape import LlamaShape
from minilora.model.lora import inject
from minilora.model.lora_shape import LoraShape


@dataclass(frozen=True)
class NewAdapter:
    """The adapter that a model is made with.

    shape: which layers get it, and its ranks
    seed: each lora_A is drawn from it and its layer's name
    dtype: of the trained parameters
    """

    shape: LoraShape
    seed: int
    dtype: torch.dtype


def build_model(
    shape: LlamaShape,
    adapter: NewAdapter | None,
    *,
    dtype: torch.dtype,
    place: AbstractContextManager[Any],
    keep_blocks: int = 0,
) -> Llama:
    """A Llama, with LoRA if there is an adapter, whose frozen weights are not initialised.

    dtype: of the frozen parameters
    place: a context in which parameters are made where they belong: a torch.device, or DeepSpeed's
        zero.Init, which partitions each one as soon as it is there
    keep_blocks: how many blocks, the last ones, keep their activations for backward
    """
    # The modules make their parameters in torch's default dtype. zero.Init reads it too.
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with place:
            model = Llama(shape, keep_blocks)
            if adapter is not None:
                inject(model, adapter.shape, adapter.seed, adapter.dtype)
    finally:
        torch.set_default_dtype(default)
    return model
