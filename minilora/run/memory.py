"""Memory of this process and its GPU, as counted and as the system shows it."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

GIB = 2**30


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
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return {
        "rss_gib": pages * resource.getpagesize() / GIB,
        "rss_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    }
