"""Causal attention over documents that lie one after another in a flat run of tokens."""

# Shape letters: N tokens, H heads, K kv heads, E head dim.

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], boundaries: Tensor
) -> Tensor:
    """Attend within each document, never across one and never ahead.

    query: (N, H, E); key, value: (N, K, E), K dividing H; lengths: tokens of each document, sum N;
    boundaries: (documents + 1,) int32, the running sum of lengths from 0. Returns (N, H, E).
    Half precision off the CPU takes torch's varlen kernel where that has the head size (a multiple
    of 8 up to 256: mha_varlen_fwd in torch's flash_api.cpp), all else one SDPA call per document.
    """
    away, size = query.device.type != "cpu", query.shape[-1]
    if away and query.dtype in (torch.bfloat16, torch.float16) and size % 8 == 0 and size <= 256:
        return _varlen(query, key, value, boundaries, max(lengths))
    if away and query.dtype == torch.float32:
        # Of torch's GPU kernels in fp32, only the one that makes all N x N scores takes groups.
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # Not slices: the gradient of each would be a whole (N, H, E), zero but for its own rows.
    documents = (torch.split(x, list(lengths)) for x in (query, key, value))
    return torch.cat([_attend_document(*each) for each in zip(*documents, strict=True)])


def _attend_document(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    attended = F.scaled_dot_product_attention(  # over (1, heads, N, E)
        query.transpose(0, 1).unsqueeze(0),
        key.transpose(0, 1).unsqueeze(0),
        value.transpose(0, 1).unsqueeze(0),
        is_causal=True,
        enable_gqa=True,
    )
    return attended.squeeze(0).transpose(0, 1)  # (N, H, E)


def _varlen(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # needs CUDA kernels

    accepted = inspect.signature(varlen_attn).parameters
    # Causality is spelled is_causal in torch 2.10 and window_size=(-1, 0) from 2.11 on. The kernel
    # takes grouped queries in all of them (mha_varlen_fwd and _bwd); from 2.12 on it wants a flag.
    options: dict[str, Any] = {"window_size": (-1, 0)}
    if "is_causal" in accepted:
        options = {"is_causal": True}
    if "enable_gqa" in accepted:
        options["enable_gqa"] = True
    attended = varlen_attn(query, key, value, boundaries, boundaries, longest, longest, **options)
    assert isinstance(attended, Tensor)  # a tuple only where more outputs are asked for
    return attended
