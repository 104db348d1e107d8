"""Copies of trained parameters, where the model computes in another dtype than they have.

At ZeRO stage 0 the parameters of LoRA are their own fp32 masters, and on a GPU the model computes
in bf16. To cast each matrix at each use, once per tile in forward and once more in backward, would
start thousands of small kernels in a step. So a copy of each is kept, and renewed once per step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

NAME = "working_copy"  # the attribute of the parameter that holds its copy


def working(parameter: Tensor) -> Tensor:
    """What is computed with in place of a trained parameter: its copy, or itself without one.

    Whoever goes back through a graph asks for the gradient of this tensor, in its dtype, and adds
    it up for the parameter.
    """
    found: Tensor = getattr(parameter, NAME, parameter)
    return found


class WorkingCopies:
    """The copies of some parameters, in `dtype`. Each is found by `working`."""

    def __init__(self, parameters: Iterable[Any], dtype: torch.dtype) -> None:
        self._parameters = [*parameters]
        self._copies = [p.detach().to(dtype, copy=True) for p in self._parameters]
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            setattr(parameter, NAME, copy.requires_grad_())

    @torch.no_grad()
    def renew(self) -> None:
        """To be called whenever the parameters have changed."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._parameters)
