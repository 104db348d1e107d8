"""Memory of this process and its GPU, as counted and as the system shows it."""

from __future__ import annotations

from pathlib import Path

import torch

from minilora.run.budget import CONTEXT, GIB

CPU_FIGURES = {"rss_gib": "VmRSS:", "rss_peak_gib": "VmHWM:"}
# What is going on, by the file and function that run; the innermost one known counts.
PHASES = {
    "engine._build": "building the model",
    "engine.forward_backward": "forward",
    "engine.backward": "backward",
    "loss.forward": "the loss",
    "recompute.backward": "backward, computing a block again",
    "partition_parameters.all_gather_coalesced": "gathering a block",
    "engine.step": "the optimizer step",
    "engine.trained_tensors": "saving",
    "engine.moments": "saving",
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


def memory_limit(device: torch.device, processes: int) -> int:
    """Bytes that one of this machine's processes may take, before it builds its model.

    On a GPU what is free, and the context that lies there already. On a CPU half of its share of
    what the machine, or the container, has left: others live there, and it may not swap.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(min(total, free + CONTEXT))
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    left = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (most := (group / "memory.max").read_text()) != "max\n":
        left = min(left, int(most) - int((group / "memory.current").read_text()))
    return left // (2 * processes)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def phase_of(error: BaseException) -> str:
    """What was going on when the error was raised, read off its traceback."""
    phase, trace = "start-up", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        phase = PHASES.get(f"{Path(code.co_filename).stem}.{code.co_name}", phase)
        trace = trace.tb_next
    return phase
