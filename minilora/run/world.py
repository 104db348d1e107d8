"""The processes of the run, and what they tell each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from minilora.config import TrainSettings


class World:
    """The processes of the run. Made first, closed last."""

    def __init__(self, train: TrainSettings) -> None:
        if "RANK" not in os.environ:  # started without a launcher: a world of one
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
        on_gpu = torch.cuda.is_available()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", self.local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            # Blocks of many sizes come and go; without this 1 to 2 GiB of 24 lie between them.
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
            torch.cuda.set_device(self.device)
        patience = timedelta(seconds=train.ddp_timeout)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=patience)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Host-side messages; waiting here may take as long as one process tokenises or writes.
        self.host_group = dist.new_group(backend="gloo", timeout=timedelta(days=7))

    def gather_objects(self, mine: object) -> list[Any]:
        """What every rank passed in, by rank. Collective."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, mine, group=self.host_group)
        return gathered

    def gather_numbers(self, mine: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, by rank. Collective; a handful of bytes."""
        row = torch.tensor(mine, dtype=torch.float64, device=self.device)
        rows = [torch.empty_like(row) for _ in range(self.size)]
        dist.all_gather(rows, row)
        return [numbers.tolist() for numbers in rows]

    def close(self) -> None:
        """Wait for all ranks, then part. Collective."""
        self.gather_objects(None)
        dist.destroy_process_group()


def wants_bf16(train: TrainSettings) -> bool:
    """The bf16 setting, or its default: on a GPU yes, on a CPU no."""
    return torch.cuda.is_available() if train.bf16 is None else train.bf16


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
