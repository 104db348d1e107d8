"""Block inputs in host memory between forward and backward."""

# Shape letters: N tokens, D model.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class HostStore:
    """A stack of tensors in host memory, taken back in the reverse order.

    On a GPU both copies run on a stream of their own: out while the block computes, and back one
    tensor ahead of the block that is going to ask for it. The stream that computes waits for each
    copy before its device memory is let go. (With Tensor.record_stream the host, which runs ahead
    of the GPU, would find that memory still taken, and take more for every block.)
    """

    def __init__(self) -> None:
        self.held: list[Tensor] = []
        self.ahead: tuple[int, Tensor] | None = None
        self.stream: torch.cuda.Stream | None = None

    def put(self, hidden: Tensor) -> int:
        """Start copying (N, D) out; returns its place. To be kept until after `settle`."""
        host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=hidden.is_cuda)
        with self._copying(hidden):
            host.copy_(hidden, non_blocking=True)
        self.held.append(host)
        return len(self.held) - 1

    def settle(self) -> None:
        """Let what is computed from now on wait for the copies so far."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def take(self, place: int, like: Tensor) -> Tensor:
        """The tensor on top of the stack, on the device of `like`; the next one starts coming."""
        assert place == len(self.held) - 1, "taken in the reverse order of put"
        if self.ahead is None:
            self.ahead = place, self._fetch(self.held[place], like)
        coming, hidden = self.ahead
        assert coming == place
        self.settle()
        self.held.pop()
        self.ahead = (place - 1, self._fetch(self.held[-1], like)) if self.held else None
        return hidden

    def _fetch(self, host: Tensor, like: Tensor) -> Tensor:
        back = torch.empty_like(host, device=like.device)
        with self._copying(back):
            back.copy_(host, non_blocking=True)
        return back

    @contextmanager
    def _copying(self, on_device: Tensor) -> Iterator[None]:
        """Copies inside follow all that was computed."""
        if not on_device.is_cuda:
            yield
            return
        if self.stream is None:
            self.stream = torch.cuda.Stream(on_device.device)  # type: ignore[no-untyped-call]
        self.stream.wait_stream(torch.cuda.current_stream(on_device.device))
        with torch.cuda.stream(self.stream):
            yield
