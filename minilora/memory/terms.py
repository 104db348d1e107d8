"""What the memory plan adds up and prints: lines of bytes, and the tensors of each line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Tensor(NamedTuple):
    """`times` tensors (tokens, features) of one kind.

    made: the file of minilora/model that makes it, and the class or function in that file.
    """

    name: str
    tokens: int
    features: int
    made: str = ""
    times: int = 1

    @property
    def elements(self) -> int:
        return self.times * self.tokens * self.features

    @property
    def origin(self) -> str:
        """How the number of elements comes about."""
        several = f"{self.times:,} x " if self.times != 1 else ""
        return f"{several}{self.tokens:,} tokens x {self.features:,}"


@dataclass(frozen=True)
class Term:
    """A line of the plan: `count` elements of `each` bytes.

    part: parameters, activations, optimizer states, accumulation, fixed or host; origin: how the
    count comes about, empty where the number says it; tensors: what the line consists of, where
    the plan knows the tensors one by one.
    """

    part: str
    name: str
    count: int
    each: int
    origin: str = ""
    tensors: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, name: str, tensors: Sequence[Tensor], each: int) -> Term:
        """A line of activations."""
        count = sum(tensor.elements for tensor in tensors)
        return cls("activations", name, count, each, tensors=tuple(tensors))

    @property
    def bytes(self) -> int:
        return self.count * self.each

    @property
    def formula(self) -> str:
        """An expression for the bytes."""
        return f"{self.origin or format(self.count, ',')} x {self.each:,} B"
