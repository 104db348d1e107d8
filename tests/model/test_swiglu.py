"""SwiGLU and its backward by hand, against autograd's of the plain equation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.model.swiglu import swiglu
from tests.support.elementwise import (
    TOLERANCE,
    check_against_autograd,
    check_that_nothing_given_changes,
)


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_output_and_gradients_equal_autograds(dtype: torch.dtype) -> None:
    check_against_autograd(swiglu, plain_swiglu, 2, dtype)


def test_inputs_and_incoming_gradient_stay_as_they_are() -> None:
    check_that_nothing_given_changes(swiglu, 2)
