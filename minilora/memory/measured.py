"""What a process really takes of memory, and what it was doing when there was no more."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from minilora.memory.peak import CONTEXT, GIB, NCCL

# Allocations that memory_snapshot notes: some ten steps of the 8B model, which makes about 10,000
# in each.
RECORDED = 100_000
# What errors say that are no torch.OutOfMemoryError: of torch's CPU allocator; of CUDA and NCCL
# where they allocate by themselves, as for pinned memory; and of cuBLAS.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
# Our figures of a process on a CPU, and the lines of /proc/self/status that they are read from.
# psutil has no peak: its memory_info on Linux ends with the resident set.
CPU_FIGURES = {"rss_gib": "VmRSS:", "rss_peak_gib": "VmHWM:"}
# Which moment of the memory plan is going on while a function runs, by folder, file and function.
# Of nested calls the innermost one that is listed counts. Those in zero/ and runtime/ are
# DeepSpeed's; tests/memory/test_measured.py looks each of them up.
MOMENT_OF = {
    "training/engine._build": "start-up",
    "training/engine.forward_backward": "forward",
    "training/engine.score": "forward",
    "training/engine.step": "step",
    "training/engine.trained_tensors": "save",
    "training/engine.moments": "save",
    "model/loss.forward": "loss",
    "model/loss.head_scores": "loss",
    "model/recompute.backward": "recompute",
    "runtime/engine.backward": "recompute",
    "zero/partition_parameters.all_gather_coalesced": "gather",
    "zero/partition_parameters.wait": "gather",
}


def read_memory(device: torch.device) -> dict[str, float]:
    """GiB in use now, by the names of the log. It takes microseconds.

    On a GPU: the peaks of what torch allocated and reserved, and what the whole device has in use,
    as nvidia-smi shows it. On a CPU: the resident set of this process, now and at its peak.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return {
            "gpu_memory_used_gib": (total - free) / GIB,
            "gpu_memory_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "gpu_memory_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        }

    # Not getrusage, whose peak starts from that of the process which started this one.
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    kib = dict(line.split()[:2] for line in lines if line.startswith("Vm"))
    return {name: int(kib[key]) * 1024 / GIB for name, key in CPU_FIGURES.items()}


def free_memory(device: torch.device, processes: int) -> int:
    """Bytes that this process can have in all, with what it has already of its GPU.

    On a CPU the `processes` of this machine or container share what is free.
    """
    if device.type == "cuda":
        # CUDA's context and NCCL's buffers are there by now, and the plan counts them too.
        free, total = torch.cuda.mem_get_info(device)
        return min(total, free + CONTEXT + NCCL)

    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    free = int(kib) * 1024
    group = Path("/sys/fs/cgroup")  # a container's limit, where there is one
    if (group / "memory.max").exists():
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    return free // processes


def record_history() -> None:
    """From now on note every allocation of the GPU, and where in the code it was made."""
    torch.cuda.memory._record_memory_history(max_entries=RECORDED)


def write_history(path: Path) -> None:
    """Write what was noted, in torch's format, which https://pytorch.org/memory_viz shows."""
    path.parent.mkdir(parents=True, exist_ok=True)  # of another machine it may not be there yet
    torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]


def expand_segments() -> None:
    """Ask for torch's expandable segments, unless the environment says how to allocate.

    Tensors of many sizes come and go. Without this, 1 to 2 GiB of 24 lie unused between them, by
    users' reports. Torch (2.10 to 2.13) reads the environment when CUDA is first used, not when it
    is imported.
    """
    # The setting has a newer and an older name, and if both are there the older one counts.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and any(words in message for words in OUT_OF_MEMORY)


def moment_of(error: BaseException) -> str:
    """The moment at which an error was raised, read off its traceback; `start-up` by default."""
    moment = "start-up"
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        file = Path(code.co_filename)
        moment = MOMENT_OF.get(f"{file.parent.name}/{file.stem}.{code.co_name}", moment)
        trace = trace.tb_next
    return moment
