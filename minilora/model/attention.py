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
    Where torch has a kernel for documents of various lengths, it computes all of them in one call;
    elsewhere each document is a call of scaled_dot_product_attention (SDPA).
    """
    if _has_varlen_kernel(query):
        return _varlen(query, key, value, boundaries, max(lengths))

    if query.device.type != "cpu" and query.dtype == torch.float32:
        # Torch's memory-efficient kernel in fp32 wants as many key heads as query heads. Given
        # fewer, SDPA would fall back to the kernel that makes all N x N scores.
        group = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(group, 1)  # (N, H, E)
        value = value.repeat_interleave(group, 1)  # (N, H, E)

    # torch.split and not slices: in backward each slice would make a gradient of the whole size,
    # (N, H, E), which is zero outside of its own rows.
    documents = zip(
        torch.split(query, list(lengths)),
        torch.split(key, list(lengths)),
        torch.split(value, list(lengths)),
        strict=True,
    )
    return torch.cat([_attend_document(*document) for document in documents])


def _has_varlen_kernel(query: Tensor) -> bool:
    """Off the CPU, in half precision, for head sizes that are a multiple of 8 up to 256.

    Those are the conditions of mha_varlen_fwd in torch's flash_api.cpp.
    """
    head_dim = query.shape[-1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type != "cpu" and half and head_dim % 8 == 0 and head_dim <= 256


def _attend_document(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    attended = F.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),  # (1, H, N, E)
        key.transpose(0, 1).unsqueeze(0),  # (1, K, N, E)
        value.transpose(0, 1).unsqueeze(0),  # (1, K, N, E)
        is_causal=True,
        enable_gqa=True,
    )
    return attended.squeeze(0).transpose(0, 1)  # (N, H, E)


def _varlen(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int) -> Tensor:
    """All documents in one call. Causality is spelled in two ways, by torch's version."""
    from torch.nn.attention.varlen import varlen_attn  # needs CUDA kernels

    accepted = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if "is_causal" in accepted:  # torch 2.10
        options["is_causal"] = True
    else:  # from 2.11 on: any number of tokens back, and none ahead
        options["window_size"] = (-1, 0)
    # The kernel takes grouped queries in all versions (mha_varlen_fwd and mha_varlen_bwd), but
    # from 2.12 on the function wants to be told.
    if "enable_gqa" in accepted:
        options["enable_gqa"] = True

    attended = varlen_attn(query, key, value, boundaries, boundaries, longest, longest, **options)
    assert isinstance(attended, Tensor)  # a tuple only where more outputs are asked for
    return attended
