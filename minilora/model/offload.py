"""Saved block inputs in host memory between forward and backward."""

# Shape letters: N tokens, D model.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class HostStore:
    """A stack of tensors in host memory: the last one put there is the first one taken back.

    Backward needs the inputs of the blocks in the reverse order of forward, hence a stack. On a
    GPU the copies run on a stream of their own: to the host while the block computes, and back to
    the GPU while the block above computes, one tensor ahead of the block that will ask for it.

    Device memory must not be reused while a copy still reads or writes it. So the stream that
    computes waits for the copy before that memory is freed. Tensor.record_stream would not do: the
    host runs ahead of the GPU, would find the memory not free yet, and would take more for every
    block.
    """

    def __init__(self) -> None:
        self.held: list[Tensor] = []  # in host memory, pinned where there is a GPU
        self.ahead: tuple[int, Tensor] | None = None  # place and tensor that is coming back
        self.stream: torch.cuda.Stream | None = None  # of the copies, made at the first one

    def put(self, hidden: Tensor) -> int:
        """Start copying (N, D) to the host. Returns its place in the stack.

        The caller must not free the tensor before it has called `settle`.
        """
        host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=hidden.is_cuda)
        with self._copying(hidden):
            host.copy_(hidden, non_blocking=True)
        self.held.append(host)
        return len(self.held) - 1

    def settle(self) -> None:
        """Make what is computed from now on wait for the copies that were started."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def take(self, place: int, like: Tensor) -> Tensor:
        """The tensor on top of the stack, on the device of `like`; the next one starts to come."""
        assert place == len(self.held) - 1, "taken in the reverse order of put"
        if self.ahead is None:  # the first one of a backward
            self.ahead = (place, self._fetch(self.held[place], like))
        coming, hidden = self.ahead
        assert coming == place
        self.settle()

        self.held.pop()
        self.ahead = None
        if self.held:
            self.ahead = (place - 1, self._fetch(self.held[-1], like))
        return hidden

    def _fetch(self, host: Tensor, like: Tensor) -> Tensor:
        back = torch.empty_like(host, device=like.device)
        with self._copying(back):
            back.copy_(host, non_blocking=True)
        return back

    @contextmanager
    def _copying(self, on_device: Tensor) -> Iterator[None]:
        """Run copies on their stream, after all that has been computed; without a GPU as usual."""
        if not on_device.is_cuda:
            yield
            return
        if self.stream is None:
            self.stream = torch.cuda.Stream(on_device.device)  # type: ignore[no-untyped-call]
        self.stream.wait_stream(torch.cuda.current_stream(on_device.device))
        with torch.cuda.stream(self.stream):
            yield
