"""Every private attribute of DeepSpeed that minilora relies on, and every workaround, in one room.

Each function names the file of DeepSpeed that it relies on, and the reason. All of them were seen
to hold in DeepSpeed 0.19.3 to 0.19.8; setup.cfg accepts `deepspeed >= 0.19.3, < 0.20` for that
reason. Whoever moves to another release reads this file first; nothing else here is private.

Words of DeepSpeed: at stage 3 a parameter is *partitioned*. Its `data` is empty, `ds_tensor` holds
this rank's part of its flattened elements, and `ds_numel` counts the elements of the whole. All
parts have the same length, so the last ranks' parts are padded.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import utils as ds
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import groups
from torch import Tensor, nn

from minilora.settings.errors import RequestError

# How many modules the host may fetch for before the GPU has come to the first of them.
FETCHES_AHEAD = 2


class PartitionedInit(deepspeed.zero.Init):  # type: ignore[misc]
    """zero.Init without its broadcast: parameters made inside are partitioned, and left empty.

    `Init._zero_init_param` in runtime/zero/partition_parameters.py broadcasts each new parameter
    from rank 0, so that all ranks start from the same values. Here each rank reads its own part
    from the file right afterwards, so those bytes would be sent for nothing.

    With a second partition (hpZ), `_partition_param_sec` of the same file has filled it from the
    empty parameter, and gathers would prefer it to what is read. Without `ds_secondary_tensor` the
    first gather takes the first partition, and the first release makes the second from the values.
    """

    def __init__(self, **arguments: Any) -> None:
        group = groups._get_zero_param_intra_parallel_group()
        super().__init__(zero_param_parallel_group=group, **arguments)

    def _zero_init_param(self, param: Any) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()
        param.ds_secondary_tensor = None


def group_ranks(sizes: Sequence[int], rank: int, patience: float) -> None:
    """Make the groups of ranks that share a second partition (hpZ), before PartitionedInit.

    sizes: what each rank takes for the size of a group; 1 for none. patience: seconds that a
    collective of a group may take. Raises RequestError if the sizes differ. Init would make the
    groups with `_create_zero_param_parallel_group` of utils/groups.py, which leaves them torch's
    own patience (10 minutes with NCCL) whatever ddp_timeout says, and fails in a process that
    trains twice.
    """
    if len({*sizes}) > 1:
        raise RequestError(
            [
                f"zero_hpz_partition_size: the ranks take it for {', '.join(map(str, sizes))}, as "
                "their machines differ in ranks; start as many on each, or remove it"
            ]
        )
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    size, timeout = sizes[rank], timedelta(seconds=patience)
    if size > 1:
        # Every rank takes part in making every group.
        for first in range(0, len(sizes), size):
            group = dist.new_group([*range(first, first + size)], timeout=timeout)
            if first <= rank < first + size:
                groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = group


def partition_of(parameter: Any, rank: int) -> tuple[int, Tensor]:
    """This rank's part of a partitioned parameter, without the padding.

    Returns the index of the first element in the flattened whole, and the elements themselves: a
    view into `ds_tensor` (runtime/zero/partition_parameters.py), so writing to it sets the weights.
    """
    size = parameter.ds_tensor.ds_numel
    start = rank * size
    count = max(0, min(size, parameter.ds_numel - start))
    return start, parameter.ds_tensor.data[:count]


def set_partition(parameter: Any, whole: Tensor, moments: Mapping[str, Tensor], rank: int) -> None:
    """Set this rank's part of a parameter's fp32 master and of its optimizer state, at stage 3.

    whole: the full fp32 master; moments: the full state by its key in the optimizer. The local
    calls of utils/tensor_fragment.py are used, with parts that are padded here: `safe_set_full_*`
    fails when a tensor does not divide by the number of ranks, so always with 3 or 7 ranks.
    """
    size = parameter.ds_tensor.ds_numel
    rows = slice(rank * size, (rank + 1) * size)

    def padded_part(tensor: Tensor) -> Tensor:
        part = tensor.view(-1)[rows]
        return nn.functional.pad(part, (0, size - len(part)))

    ds.safe_set_local_fp32_param(parameter, padded_part(whole))
    for key, moment in moments.items():
        ds.safe_set_local_optimizer_state(parameter, padded_part(moment), key)
    assert not parameter.data.numel(), "restored while nothing is gathered"
    # `initialize` has made a second partition (hpZ) from the values before. DeepSpeed itself drops
    # those of trained parameters after each step: `invalidate_secondary_tensor` of stage3.py.
    parameter.ds_secondary_tensor = None


def link_moments(engine: Any) -> None:
    """Let DeepSpeed find the optimizer's moments by parameter, at stages 1 and 2.

    `_lazy_init_hp_params_optimizer_state` of runtime/zero/stage_1_and_2.py links them once, after
    the first group's step. With several parameter groups the others have no moments yet at that
    time and would never be found, so the flag is cleared and the linking is done again.
    """
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def partitioned_masters(engine: Any) -> list[Tensor]:
    """The flat fp32 partitions that the optimizer updates at stage 3 (runtime/zero/stage3.py)."""
    return list(engine.optimizer.fp32_partitioned_groups_flat)


def global_grad_norm(engine: Any) -> float:
    """The norm of all gradients before clipping, the same number on every rank.

    `get_global_grad_norm` of the engine returns it only after the step. `_global_grad_norm` of the
    optimizers in runtime/zero/stage3.py and stage_1_and_2.py is set before the weights are updated,
    and so is early enough to stop a run whose gradient is not finite.
    """
    return float(engine.optimizer._global_grad_norm)


def set_lead_of_host(engine: Any, device: torch.device) -> None:
    """Set how far the host runs ahead of a GPU at stage 3, so that memory stays as planned.

    With overlap_comm the gathers have a stream of their own (runtime/zero/parameter_offload.py),
    see `_keep_near`. Without it they are in the order of the computation, so that what is freed can
    be used again at once, however far ahead the host is. NCCL still gathers beside the computation,
    on a stream that torch gives it. DeepSpeed then makes the host wait in each block until the GPU
    is done with the one before: at most two events of arrived parameters may be open
    (`__max_ongoing_fetch_events` of runtime/zero/partitioned_param_coordinator.py), and a block has
    seven. That limit is against the memory of streams of their own, and is lifted here.
    """
    if device.type != "cuda" or engine.zero_optimization_stage() < 3:
        return
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    if engine.zero_overlap_comm():
        _keep_near(coordinator)
    else:
        limit = "_PartitionedParameterCoordinator__max_ongoing_fetch_events"
        assert hasattr(coordinator, limit)
        setattr(coordinator, limit, sys.maxsize)


def _keep_near(coordinator: Any) -> None:
    """Let the host be at most FETCHES_AHEAD fetches ahead of the GPU.

    `fetch_sub_module` of runtime/zero/partitioned_param_coordinator.py takes memory for what it
    gathers at once, on a stream of its own. `free_param` of partition_parameters.py marks what it
    frees with `record_stream`, so that this memory can be used again only when the GPU has come
    past its last use. A host that has queued the work of many blocks finds the memory of none of
    them free, and torch takes more from the GPU for each.

    The hooks of all modules look `fetch_sub_module` up on the engine's one coordinator.
    """
    fetch = coordinator.fetch_sub_module
    come_to: deque[torch.cuda.Event] = deque()  # in the order of the fetches

    def fetch_when_near(*args: Any, **kwargs: Any) -> None:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        come_to.append(event)
        if len(come_to) > FETCHES_AHEAD:
            come_to.popleft().synchronize()
        fetch(*args, **kwargs)

    coordinator.fetch_sub_module = fetch_when_near


def reject_bad_config(config: Mapping[str, Any]) -> str | None:
    """What DeepSpeed itself has against a configuration, in one line, or None.

    `DeepSpeedConfig` (runtime/config.py) raises exceptions of many kinds: assertions, pydantic's
    errors of many lines, its own.
    """
    try:
        DeepSpeedConfig(dict(config))
    except Exception as error:
        return " ".join(str(error).partition("[type=")[0].split())
    return None


def silence() -> None:
    """Keep DeepSpeed's own log lines, and torch's warnings about its calls, off the terminal."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls torch's collectives by names that torch is about to change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def skip_shared_memory_op() -> None:
    """Do not compile `deepspeed_shm_comm`, which comm/torch.py builds at the first start on a CPU.

    The build takes 30 s and needs a compiler, and training never calls the op: it only serves the
    all-reduce of DeepSpeed's inference engine. comm/torch.py is the only reader of this table,
    which DeepSpeed would fill by compiling a small program for each of its ops.
    """
    vars(deepspeed.ops)["__compatible_ops__"] = {}


def import_muon() -> None:
    """Import DeepSpeed's Muon optimizer before `initialize` does, and without torch's compiler.

    `initialize` (runtime/engine.py, runtime/zero/utils.py) imports runtime/zero/muon only to see
    that AdamW is another optimizer. Decorators there call torch.compile, whose import takes three
    seconds; none of the decorated functions is ever called here.
    """
    compiling = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        with suppress(ImportError):
            import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        torch.compile = compiling
