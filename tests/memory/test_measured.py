"""Memory figures, and what ran out of memory."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed

from minilora.memory.measured import (
    MOMENT_OF,
    expand_segments,
    free_memory,
    is_out_of_memory,
    moment_of,
    read_memory,
)
from minilora.memory.peak import peak_memory
from tests.support.article import ROOT, article

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # its settings' new and older name


def test_moments_are_read_off_the_traceback() -> None:
    def raised(work: Callable[[], object]) -> BaseException:
        try:
            work()
        except (RuntimeError, ValueError) as error:
            return error
        raise AssertionError("nothing was raised")

    def huge() -> torch.Tensor:
        return torch.empty(2**60)

    error = raised(huge)
    assert is_out_of_memory(error) and moment_of(error) == "start-up"
    assert not is_out_of_memory(raised(lambda: torch.zeros(2) @ torch.zeros(3)))
    from minilora.model.loss import head_loss

    hidden, targets = torch.zeros(1, 4, requires_grad=True), torch.zeros(1, dtype=torch.int64)
    strange = raised(lambda: head_loss(hidden, torch.zeros(3, 5), targets, 1.0))
    assert moment_of(strange) == "loss"
    criterion = torch.nn.CrossEntropyLoss()  # in torch/nn/modules/loss.py, and its forward too
    other = raised(lambda: criterion(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)))
    assert moment_of(other) == "start-up"


@pytest.mark.parametrize("place", MOMENT_OF)
def test_each_function_that_tells_a_moment_exists(place: str) -> None:
    """In minilora or in DeepSpeed: one file of this folder and name defines it."""
    file, _, function = place.partition(".")
    deepspeed = find_spec("deepspeed")
    assert deepspeed and deepspeed.submodule_search_locations
    roots = [ROOT / "minilora", Path(deepspeed.submodule_search_locations[0])]
    found = [path for root in roots for path in root.rglob(f"{file}.py")]
    assert len(found) == 1, f"{file}.py: {found}"
    tree = ast.parse(found[0].read_text(encoding="utf-8"))
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert function in names, f"{found[0]} has no {function}: rename it in MOMENT_OF too"


def test_the_moments_are_those_of_the_plan() -> None:
    planned = {*peak_memory(article()).by_moment}
    assert {*MOMENT_OF.values()} == planned | {"start-up"}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),  # cudaHostAlloc, cudaStreamCreate
        torch.distributed.DistBackendError(
            "ncclUnhandledCudaError: Cuda failure 2 'out of memory'"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_memory_can_run_out_in_several_libraries(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(torch._C, "_accelerator_getAllocatorSettings"),
    reason="this release of torch, such as 2.11, cannot be asked for its allocator's settings",
)
def test_torch_reads_that_segments_are_to_expand_after_it_was_imported() -> None:
    code = "import torch; from minilora.memory.measured import expand_segments as f; f(); "
    code += "print(torch._C._accelerator_getAllocatorSettings())"
    none = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    found = subprocess.run([sys.executable, "-c", code], env=none, capture_output=True, check=True)
    assert found.stdout.decode().strip() == "expandable_segments:True"


@pytest.mark.parametrize("name", ALLOCATOR)
def test_what_the_user_says_of_the_allocator_stands(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ALLOCATOR:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:512")
    expand_segments()
    assert {key: os.environ.get(key) for key in ALLOCATOR} == {
        **dict.fromkeys(ALLOCATOR), name: "max_split_size_mb:512"
    }  # fmt: skip


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
