"""Attention over documents, against softmax written out and against autograd's backward of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minilora.model.attention import causal_attention
from tests.support.elementwise import (
    TOLERANCE,
    check_against_autograd,
    check_that_nothing_given_changes,
)

# Documents of 4, 1 and 2 tokens, with 2 heads and 1 kv head, all cut out of one tensor (7, 4, E).
LENGTHS = (4, 1, 2)
BOUNDARIES = (0, 4, 5, 7)


def attend(x: Tensor) -> Tensor:
    query, key, value = x[:, :2], x[:, 2:3], x[:, 3:]
    return causal_attention(query, key, value, LENGTHS, torch.tensor(BOUNDARIES))


def plain_attend(x: Tensor) -> Tensor:
    query, key, value = x[:, :2], x[:, 2:3], x[:, 3:]
    found = []
    for start, end in zip(BOUNDARIES[:-1], BOUNDARIES[1:], strict=True):
        q, k, v = (part[start:end].transpose(0, 1) for part in (query, key, value))
        scores = (q @ k.transpose(1, 2)) / x.shape[-1] ** 0.5  # (heads, N, N)
        ahead = torch.ones(end - start, end - start).triu(1).bool()
        weights = scores.masked_fill(ahead, float("-inf")).softmax(-1)
        found.append((weights @ v).transpose(0, 1))  # (N, heads, E)
    return torch.cat(found)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_output_and_gradients_equal_autograds(dtype: torch.dtype) -> None:
    check_against_autograd(attend, plain_attend, 1, dtype)


def test_input_and_incoming_gradient_stay_as_they_are() -> None:
    check_that_nothing_given_changes(attend, 1)
