"""Rotary positions: the angles against transformers, the rotation and its backward by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minilora.files.model_config import shape_from_config
from minilora.model.rope import rotate, rotation
from tests.support.elementwise import (
    TOLERANCE,
    check_against_autograd,
    check_that_nothing_given_changes,
)
from tests.support.models import LLAMA3_ROPE, random_llama


def angles(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of 7 positions for heads of 6 numbers."""
    half = torch.arange(21, dtype=torch.float64).view(7, 1, 3)
    both = half.repeat(1, 1, 2)  # (7, 1, 6)
    return both.cos().to(dtype), both.sin().to(dtype)


def turn(x: Tensor) -> Tensor:
    return rotate(x, angles(x.dtype))


def plain_turn(x: Tensor) -> Tensor:
    """As transformers writes it."""
    cos, sin = angles(x.dtype)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_output_and_gradients_equal_autograds(dtype: torch.dtype) -> None:
    check_against_autograd(turn, plain_turn, 1, dtype)


def test_input_and_incoming_gradient_stay_as_they_are() -> None:
    check_that_nothing_given_changes(turn, 1)


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, {"rope_type": "default", "rope_theta": 2e6}])
def test_rotation_in_all_three_bands_equals_transformers(rope: dict[str, object]) -> None:
    theirs = random_llama(head_dim=64, rope_parameters=rope)
    shape = shape_from_config(theirs.config.to_dict())
    positions = torch.cat(
        [torch.arange(0, 64), torch.arange(8190, 8260), torch.arange(131000, 131072)]
    )
    for dtype in (torch.float32, torch.bfloat16):
        like = torch.zeros(1, dtype=dtype)
        cos, sin = LlamaRotaryEmbedding(theirs.config)(like, positions[None])
        mine = rotation(shape.rope, shape.head_dim, positions, dtype)
        torch.testing.assert_close(mine[0][:, 0], cos[0], rtol=0, atol=0)
        torch.testing.assert_close(mine[1][:, 0], sin[0], rtol=0, atol=0)
