"""Memory figures, and what ran out of memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from minilora.run.memory import free_memory, is_out_of_memory, phase_of, read_memory


def test_phases_are_read_off_the_traceback() -> None:
    def raised(work: Callable[[], object]) -> BaseException:
        try:
            work()
        except RuntimeError as error:
            return error
        raise AssertionError("nothing was raised")

    def huge() -> torch.Tensor:
        return torch.empty(2**60)

    error = raised(huge)
    assert is_out_of_memory(error) and phase_of(error) == "start-up"
    assert not is_out_of_memory(raised(lambda: torch.zeros(2) @ torch.zeros(3)))
    from minilora.model.loss import head_loss

    hidden, targets = torch.zeros(1, 4, requires_grad=True), torch.zeros(1, dtype=torch.int64)
    strange = raised(lambda: head_loss(hidden, torch.zeros(3, 5), targets, 1.0))
    assert phase_of(strange) == "loss"


def test_processes_share_what_the_machine_has_free() -> None:
    """As psutil reads it; a container may have less."""
    free = [free_memory(torch.device("cpu"), processes) for processes in (1, 4)]
    available = psutil.virtual_memory().available
    assert free[0] < 1.015 * available
    assert free[1] == pytest.approx(free[0] / 4, rel=0.05)
    if not Path("/sys/fs/cgroup/memory.max").exists():
        assert free[0] == pytest.approx(available, rel=0.015)


def test_memory_of_this_process_grows_with_what_it_holds() -> None:
    before = read_memory(torch.device("cpu"))
    held = torch.ones(64 * 2**20 // 4)
    after = read_memory(torch.device("cpu"))
    assert 0.05 < after["rss_gib"] - before["rss_gib"] < 0.08
    assert after["rss_peak_gib"] >= after["rss_gib"] - 1e-9
    assert held.sum() == len(held)
