"""What is changed of DeepSpeed, whose part is looked up in its source where it cannot run here."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from typing import Any

import deepspeed.ops
import pytest
import torch
from deepspeed.comm.torch import build_shm_op
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from minilora.training import deepspeed_internals as internals

LIMIT = "_PartitionedParameterCoordinator__max_ongoing_fetch_events"
CUDA = torch.device("cuda")


class Coordinator:
    """Notes what is fetched."""

    def __init__(self, noted: list[str]) -> None:
        self.noted = noted
        setattr(self, LIMIT, 2)

    def fetch_sub_module(self, module: str, forward: bool) -> None:
        self.noted.append(f"fetch {module}")


def engine(coordinator: Coordinator, stage: int, overlap_comm: bool) -> Any:
    """What is asked of DeepSpeed's engine."""
    offload = SimpleNamespace(get_param_coordinator=lambda: coordinator)
    return SimpleNamespace(
        optimizer=SimpleNamespace(parameter_offload=offload),
        zero_optimization_stage=lambda: stage,
        zero_overlap_comm=lambda: overlap_comm,
    )


def test_deepspeed_still_has_what_is_relied_on() -> None:
    source = inspect.getsource(PartitionedParameterCoordinator)
    assert "self.__max_ongoing_fetch_events: int = 2" in source
    assert "len(self.__ongoing_fetch_events) > self.__max_ongoing_fetch_events" in source
    assert inspect.signature(PartitionedParameterCoordinator.fetch_sub_module).parameters
    hooks = inspect.getsource(DeepSpeedZeRoOffload)
    assert hooks.count("param_coordinator.fetch_sub_module(") == 2, "looked up at each call"
    assert ") if overlap_comm else get_accelerator().default_stream()" in hooks
    assert DeepSpeedEngine.zero_overlap_comm and DeepSpeedEngine.zero_optimization_stage


def test_on_a_cpu_no_op_is_compiled_and_no_compiler_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(OpBuilder, "has_function", lambda _, name, *words: tried.append(name))
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    internals.skip_shared_memory_op()
    assert build_shm_op() is None and not tried


def test_with_a_stream_for_gathers_the_host_stays_two_fetches_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An event before each fetch; the host waits for the one two fetches back."""
    noted: list[str] = []

    class Event:
        made = 0

        def __init__(self) -> None:
            Event.made += 1
            self.name = f"before {Event.made}"

        def record(self) -> None:
            noted.append(self.name)

        def synchronize(self) -> None:
            noted.append(f"wait for {self.name}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    coordinator = Coordinator(noted)
    internals.set_lead_of_host(engine(coordinator, 3, overlap_comm=True), CUDA)
    for module in "abcd":
        coordinator.fetch_sub_module(module, forward=True)
    assert noted == [
        "before 1", "fetch a",
        "before 2", "fetch b",
        "before 3", "wait for before 1", "fetch c",
        "before 4", "wait for before 2", "fetch d",
    ]  # fmt: skip
    assert getattr(coordinator, LIMIT) == 2


def test_in_one_stream_nothing_makes_the_host_wait() -> None:
    coordinator = Coordinator([])
    fetch = coordinator.fetch_sub_module
    internals.set_lead_of_host(engine(coordinator, 3, overlap_comm=False), CUDA)
    assert getattr(coordinator, LIMIT) == sys.maxsize
    assert coordinator.fetch_sub_module == fetch


@pytest.mark.parametrize(("stage", "device"), [(3, "cpu"), (2, "cuda")])
def test_elsewhere_deepspeed_is_left_alone(stage: int, device: str) -> None:
    coordinator = Coordinator([])
    untouched = SimpleNamespace(
        **vars(engine(coordinator, stage, overlap_comm=False)) | {"optimizer": None}
    )
    internals.set_lead_of_host(untouched, torch.device(device))
    assert getattr(coordinator, LIMIT) == 2
