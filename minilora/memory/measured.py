"""Memory of this process and its GPU, as counted and as the system shows it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from minilora.memory.peak import CONTEXT, GIB, NCCL

RECORDED = 100_000  # allocations; a step of the 8B model has some 10,000
# In errors of torch's CPU allocator; of CUDA and NCCL where not torch allocates, as for pinned
# memory; and of cuBLAS.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
CPU_FIGURES = {"rss_gib": "VmRSS:", "rss_peak_gib": "VmHWM:"}
# Phases of the memory plan, by the file and function that run; the innermost one known counts.
PHASES = {
    "engine._build": "start-up",
    "engine.forward_backward": "forward",
    "engine.score": "forward",
    "engine.backward": "recompute",
    "loss.forward": "loss",
    "loss.head_scores": "loss",
    "recompute.backward": "recompute",
    "partition_parameters.all_gather_coalesced": "gather",
    "partition_parameters.wait": "gather",
    "engine.step": "step",
    "engine.trained_tensors": "save",
    "engine.moments": "save",
}


def read_memory(device: torch.device) -> dict[str, float]:
    """GiB in use now, by the names of the log; costs microseconds.

    On a GPU: the peaks of what torch allocated and reserved, and what the whole device has in use,
    as nvidia-smi shows it. On a CPU: this process's resident set, at its peak and now.
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
    return {name: int(kib[key]) / 2**20 for name, key in CPU_FIGURES.items()}


def free_memory(device: torch.device, processes: int) -> int:
    """Bytes that this process can have in all: of its GPU, or of the memory that the `processes`
    of this machine or container share. What CUDA and NCCL hold already is among them.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return min(total, free + CONTEXT + NCCL)
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    free, group = int(kib) * 1024, Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (most := (group / "memory.max").read_text()) != "max\n":
        free = min(free, int(most) - int((group / "memory.current").read_text()))
    return free // processes


def record_history() -> None:
    """From now on note every allocation of the GPU, with where in the code it came from."""
    torch.cuda.memory._record_memory_history(max_entries=RECORDED)


def write_history(path: Path) -> None:
    """What was noted, in torch's format: https://pytorch.org/memory_viz shows it."""
    torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]


def expand_segments() -> None:
    """Ask for torch's expandable segments, unless the environment says how to allocate.

    Blocks of many sizes come and go; without this 1 to 2 GiB of 24 lie between them. Torch (2.10 to
    2.13) reads the environment when CUDA is first used, not when it is imported.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # its older name, which would override this one
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def phase_of(error: BaseException) -> str:
    """What was going on when the error was raised, read off its traceback."""
    phase, trace = "start-up", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        phase = PHASES.get(f"{Path(code.co_filename).stem}.{code.co_name}", phase)
        trace = trace.tb_next
    return phase
