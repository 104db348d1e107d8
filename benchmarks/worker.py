"""python -m benchmarks.worker ORDER.json: one process of one variant; speed.py starts these."""

from __future__ import annotations

import os
import sys
from typing import Any


def main() -> None:
    """Run the variant that the order names."""
    from benchmarks.turns import Order, Turns

    order = Order.read(sys.argv[1])
    turns = Turns(order)
    if order.variant.simulated or os.environ.get("BENCHMARK_FAKE"):
        # BENCHMARK_FAKE is for a machine where NCCL does not start, not even for one process.
        _pretend(order.variant.simulated or 1)
    if order.variant.system == "matmul":
        _matmul(turns)
    elif order.variant.system == "minilora":
        from benchmarks import ours

        turns.mark("imports")
        _count_gathers(turns)
        ours.run(turns)
    else:
        from benchmarks import peers

        turns.mark("imports")
        if order.variant.system == "trainer":
            _count_gathers(turns)
        peers.run(turns)


def _count_gathers(turns: Any) -> None:
    """Count what DeepSpeed gathers: bytes of whole outputs, and calls."""
    import deepspeed.comm.torch

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for half a minute
    # deepspeed.comm.torch is torch itself by the time of import; the module has this name.
    backend = sys.modules["deepspeed.comm.torch"].TorchBackend
    original = backend.get_all_gather_function

    def counting(cls: Any) -> Any:
        function = original()

        def gather(output_tensor: Any, *args: Any, **kwargs: Any) -> Any:
            turns.counted["bytes"] += output_tensor.nbytes
            turns.counted["calls"] += 1
            return function(output_tensor, *args, **kwargs)

        return gather

    backend.get_all_gather_function = classmethod(counting)


def _pretend(ranks: int) -> None:
    """Be rank 0 of many whose messages never arrive: a gather repeats this rank's own part."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    real = dist.new_group
    dist.new_group = lambda *args, **kwargs: real()  # type: ignore[assignment]
    dist.init_process_group = lambda *args, **kwargs: None  # type: ignore[assignment]


def _matmul(turns: Any) -> None:
    """Steps of one large matmul each: what the machine can do at the moment."""
    import torch

    on_gpu = turns.order.device == "cuda"
    size, count = (8192, 200) if on_gpu else (1024, 10)
    options: dict[str, Any] = {"device": turns.order.device}
    options["dtype"] = torch.bfloat16 if on_gpu else torch.float32
    a, b = torch.randn(size, size, **options), torch.randn(size, size, **options)
    for _ in range(turns.order.steps):
        for _ in range(count):
            a @ b
        turns.counted["bytes"] = count * 2 * size**3  # not bytes: the FLOPs of this step
        turns.step_done(0.0, dict)


if __name__ == "__main__":
    main()
