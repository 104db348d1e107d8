"""How memory is measured: peaks of torch's allocators, and one made-up rank of many."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._profiler import RecordScope
from torch.autograd import _disable_profiler, _enable_profiler, _prepare_profiler
from torch.profiler import record_function

from minilora.files.tensor_parts import TensorPart
from minilora.model.lora import lora_parameters
from minilora.processes.machines import Machine
from minilora.processes.world import World
from minilora.training.engine import Engine


class Pretended(World):
    """Rank 0 of many whose messages never arrive: a gather repeats this rank's own part."""

    def __init__(self, size: int, device: str) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(size))
        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
        self.rank, self.size, self.sharing = 0, size, size
        self.machine = Machine("this machine", tuple(range(size)))
        self.machines = [self.machine]
        self.device = torch.device(device, 0) if device == "cuda" else torch.device("cpu")

    def gather_objects(self, mine: object) -> list[Any]:
        return [mine] * self.size


def make_up(packed: Tensor) -> None:
    """Fill a matrix in 4 bits with random levels, and with an absmax of 4e-5 to 0.75 each.

    A random absmax may be a denormal number, which slows a CPU down tenfold.
    """
    packed.random_(56, 64)


class MadeUp(Engine):
    """An engine whose weights are random numbers, made where they are kept."""

    def _parts_to_read(self) -> Iterator[TensorPart]:
        for piece in super()._parts_to_read():
            if piece.packed:
                make_up(piece.destination)
            else:
                piece.destination.normal_(std=0.02)
        yield from ()

    def _check_norm(self) -> None:
        """Fake collectives make no numbers to check."""


class GpuMeter:
    """Peaks of torch.cuda's allocator within named windows, which may be nested."""

    def __init__(self) -> None:
        self.notes: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self._open: list[str] = []

    def _fold(self) -> None:
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        # Of the whole run: what torch has reserved it keeps.
        self.notes["reserved"] = max(reserved, self.notes.get("reserved", 0))
        self.peaks |= {name: max(peak, self.peaks.get(name, 0)) for name in self._open}
        torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def window(self, name: str) -> Iterator[None]:
        self._fold()
        self._open.append(name)
        yield
        self._fold()
        self._open.remove(name)

    def forget(self) -> None:
        """Begin anew: earlier windows do not count."""
        self.peaks.clear()

    def close(self) -> dict[str, int]:
        return self.peaks


def used_by_this_process() -> int:
    """Bytes of the GPU that the driver counts for this process; 0 where it does not say.

    It does not from inside some containers, where it knows the process by another number.
    """
    asked = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
        for line in done.stdout.splitlines():
            pid, mebibytes = map(int, line.split(","))
            if pid == os.getpid():
                return mebibytes * 2**20
    return 0


class CpuMeter:
    """The same from torch's CPU allocator: every allocation and release from now on."""

    def __init__(self) -> None:
        self.notes: dict[str, int] = {}
        asked = torch.autograd.profiler.profile(profile_memory=True)
        told = (asked.config(), asked.kineto_activities)
        _prepare_profiler(*told)
        # Without the operations, which torch.profiler records too: they are most of the work.
        _enable_profiler(*told, {RecordScope.USER_SCOPE})

    def window(self, name: str) -> AbstractContextManager[Any]:
        return record_function(f"window {name}")

    def forget(self) -> None:
        with record_function("forget"):
            pass

    def close(self) -> dict[str, int]:
        events = [(event.name(), event) for event in _disable_profiler().events()]
        changes = sorted((e.start_ns(), e.nbytes()) for name, e in events if name == "[memory]")
        times = np.array([time for time, _ in changes])
        totals = np.cumsum([change for _, change in changes])
        peaks: dict[str, int] = {}
        forgotten = max((e.end_ns() for name, e in events if name == "forget"), default=0)
        windows = [(name[7:], e) for name, e in events if name.startswith("window ")]
        for name, event in windows:
            if event.start_ns() > forgotten:
                # With what was there just before the window.
                first, last = np.searchsorted(times, (event.start_ns(), event.end_ns()))
                peak = int(totals[max(first - 1, 0) : last].max())
                peaks[name] = max(peak, peaks.get(name, 0))
        return peaks


class GatherCount:
    """Bytes that DeepSpeed gathers from now on."""

    def __init__(self) -> None:
        self.bytes = 0
        backend = sys.modules["deepspeed.comm.comm"].cdb
        function = backend.all_gather_function

        def gather(*, output_tensor: torch.Tensor, **others: Any) -> Any:
            self.bytes += output_tensor.nbytes
            return function(output_tensor=output_tensor, **others)

        backend.all_gather_function = gather


def watch(owner: Any, method: str, meter: GpuMeter | CpuMeter, phase: str) -> None:
    """From now on every call of the method is a window."""
    function = getattr(owner, method)

    def watched(*args: Any, **kwargs: Any) -> Any:
        with meter.window(phase):
            return function(*args, **kwargs)

    setattr(owner, method, watched)


def held(engine: Engine) -> dict[str, int]:
    """Bytes of the frozen weights, of the trained ones and of AdamW's moments between steps."""
    trained = {id(parameter) for _, parameter in lora_parameters(engine.model)}
    held = {"weights": 0, "LoRA": 0, "Adam moments": 0}
    for parameter in engine.model.parameters():
        kind = "LoRA" if id(parameter) in trained else "weights"
        held[kind] += parameter.data.nbytes if parameter.data.numel() > 1 else 0
        if engine.stage == 3 and (engine.world.size > 1 or parameter.data.numel() <= 1):
            held[kind] += parameter.ds_tensor.nbytes
            if parameter.ds_secondary_tensor is not None:
                held[kind] += parameter.ds_secondary_tensor.nbytes
    for state in engine.adam.state.values():
        held["Adam moments"] += state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
    return held


def peer(
    config: dict[str, Any], rank: int, device: torch.device, dtype: torch.dtype
) -> tuple[Any, torch.optim.AdamW]:
    """transformers' Llama with PEFT's LoRA and each block checkpointed, and its optimizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(**{key: value for key, value in config.items() if key != "model_type"})
    with torch.device(device):
        model = LlamaForCausalLM._from_config(llama, dtype=dtype)
    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
