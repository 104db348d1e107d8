"""Which tensors are alive when a model takes most memory, seen below autograd."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveTensors(TorchDispatchMode):
    """Follows every storage that an operation makes, until it is let go.

    at_peak: for each window the number of live storages by their elements, when they had most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.window = ""
        self.at_peak: dict[str, Counter[int]] = {}
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._most: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor)
        sizes = [size for size, _ in self._alive.values()]
        if sum(sizes) > self._most.get(self.window, 0):
            self._most[self.window] = sum(sizes)
            self.at_peak[self.window] = Counter(sizes)
        return out

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            size = storage.nbytes() // tensor.element_size()
            self._alive[key] = size, weakref.ref(storage, lambda _: self._alive.pop(key, None))

    def enter(self, name: str) -> Callable[..., None]:
        """A hook of any kind that opens the window of this name."""

        def hook(*_: object) -> None:
            self.window = name

        return hook
