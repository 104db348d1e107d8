"""Which weights ZeRO-3 holds gathered while each module computes, by DeepSpeed's own rules.

Below, each rule names the function of DeepSpeed 0.19 that it restates. Two files of
deepspeed/runtime/zero are meant: the coordinator (partitioned_param_coordinator.py, class
PartitionedParameterCoordinator), which decides what is gathered and released, and
partition_parameters.py, which allocates the buffers. A parameter is a name and a number of
elements, since that is what DeepSpeed's rules count. What is held is counted in bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Zero:
    """A file's zero_optimization section, sizes in elements.

    The defaults are those of deepspeed/runtime/zero/config.py. offload_param: whether the frozen
    weights lie in host memory. zero_hpz_partition_size: how many ranks share a second partition of
    the weights (hpZ), 1 for none.
    """

    stage: int = 0
    reduce_bucket_size: int = 500_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    stage3_param_persistence_threshold: int = 100_000
    zero_hpz_partition_size: int = 1
    overlap_comm: bool = False
    offload_param: bool = False

    @classmethod
    def of(cls, ds_config: Mapping[str, Any]) -> Zero:
        """Read a DeepSpeed configuration without "auto" values."""
        section = dict(ds_config.get("zero_optimization", {}))
        place = section.get("offload_param") or {}
        section["offload_param"] = place.get("device", "none") != "none"
        if section.get("overlap_comm") is None:  # DeepSpeed's default depends on the stage
            section["overlap_comm"] = section.get("stage", 0) == 3
        known = {item.name for item in fields(cls)} & section.keys()
        return cls(**{name: section[name] for name in known})


class Module(NamedTuple):
    """A module as DeepSpeed sees it, with its partitioned parameters by name, in elements.

    own: what is gathered when the module is called. A block is a leaf module, so that the weights
    of its linear layers are its own. within: all parameters of the module and of its children.
    block: the number of the block; None for all other modules.
    """

    name: str
    own: Mapping[str, int]
    within: Mapping[str, int]
    block: int | None = None


class Visit(NamedTuple):
    """One call of a module, in forward or in backward.

    own: bytes of its own parameters. arriving: the most bytes held while they arrive; held: while
    it computes. Both count gathered parameters and the buffers that they were gathered into.
    """

    module: Module
    backward: bool
    arriving: int
    held: int
    own: int


class _GatherCall:
    """Parameters that one all-gather brings.

    In partition_parameters.py, `_all_gather_dtype` gathers several parameters of one dtype into
    one buffer, and `AllGatherCoalescedHandle.wait` copies each of them out of it.
    `_all_gather_sequential`, which gathers a single parameter, copies nothing: the parameter keeps
    the buffer. A buffer holds one equal part of each rank, so that each parameter's size in it is
    rounded up to a multiple of the ranks.
    """

    def __init__(self, sizes: Mapping[str, int], itemsizes: Mapping[str, int], ranks: int) -> None:
        self.elements = sum(sizes.values())
        self.gathered = sum(
            ranks * -(-size // ranks) * itemsizes[name] for name, size in sizes.items()
        )
        self.buffer = self.gathered
        self._coming: Mapping[str, int] = {n: size * itemsizes[n] for n, size in sizes.items()}

    def wait(self) -> Mapping[str, int]:
        """The parameters that are new, all of them at the first wait, and what each occupies."""
        arrived, self._coming = self._coming, {}
        if len(arrived) == 1:
            self.buffer = 0
            return dict.fromkeys(arrived, self.gathered)
        return arrived


class Gathers:
    """The visits of a micro-step, and how many bytes it gathers (`gathered`).

    It is any micro-step but the first of a run. In that one DeepSpeed records the order of the
    modules, and prefetches nothing (`reset_step` of the coordinator).
    """

    def __init__(
        self,
        modules: Sequence[Module],
        backward_from: int,
        zero: Zero,
        ranks: int,
        itemsizes: Mapping[str, int] | None = None,
    ) -> None:
        """modules: in the order in which they are called, backward from index `backward_from` on.

        ranks: among which the parameters are partitioned. itemsizes: bytes of an element, by the
        name of the parameter; without them one each, so that elements are counted.
        """
        self.gathered = 0
        self._modules, self._zero, self._ranks = modules, zero, ranks
        self._sizes = {name: size for module in modules for name, size in module.own.items()}
        self._itemsizes = itemsizes or dict.fromkeys(self._sizes, 1)

        # The state of the coordinator, with its names for it.
        self._available: dict[str, int] = {}  # ZeroParamStatus.AVAILABLE: what each occupies
        self._in_flight: dict[str, _GatherCall] = {}  # __inflight_param_registry
        self._available_elements = 0  # __n_available_params, which counts those in flight too
        self._queue = deque(  # __param_queue: every use of a parameter that is still to come
            (name, at) for at, module in enumerate(modules) for name in module.own
        )
        # __most_recent_step_id_param_fetched_for
        self._last_fetched_for = dict.fromkeys(self._sizes, -1)

        self.visits = [
            Visit(module, at >= backward_from, *self._visit(at, module), self._own(module))
            for at, module in enumerate(modules)
        ]

    def _visit(self, at: int, module: Module) -> tuple[int, int]:
        """`_fetch_sub_module_impl`, and `release_sub_module` after the module has computed."""
        self._gather([name for name in module.own if not self._is_here(name)])
        arriving = self._wait(module)

        # The module's own parameters leave the queue, unless an earlier prefetch took them out.
        still_queued = sum(self._last_fetched_for[name] < at for name in module.own)
        for _ in range(still_queued):
            name, used_at = self._queue.popleft()
            self._last_fetched_for[name] = used_at

        self._prefetch()
        held = self._memory()
        self._release(at + 1, module)
        return max(arriving, held), held

    def _own(self, module: Module) -> int:
        return sum(size * self._itemsizes[name] for name, size in module.own.items())

    def _is_here(self, name: str) -> bool:
        return name in self._available or name in self._in_flight

    def _gather(self, names: Sequence[str]) -> None:
        """`__all_gather_params_`: one call for all parameters that are missing."""
        sizes = {name: self._sizes[name] for name in names}
        call = _GatherCall(sizes, self._itemsizes, self._ranks)
        self._in_flight |= dict.fromkeys(names, call)
        self._available_elements += call.elements
        self.gathered += call.gathered

    def _wait(self, module: Module) -> int:
        """Wait for the module's own parameters. Returns the most bytes held meanwhile.

        All parameters of a call become available at its first wait, and its buffer is let go when
        the last of them has been waited for. DeepSpeed waits in the order of a set, which is
        arbitrary. The worst order is counted: all are available, and no buffer is gone yet.
        """
        waiting = [name for name in module.own if name in self._in_flight]
        for name in waiting:
            self._available |= self._in_flight[name].wait()
        most = self._memory()
        for name in waiting:
            del self._in_flight[name]
        return most

    def _prefetch(self) -> None:
        """Gather ahead: the end of `_fetch_sub_module_impl`.

        Uses are taken from the queue until their parameters fill stage3_prefetch_bucket_size, or
        what stage3_max_live_parameters leaves. The last one may go beyond that. A use whose
        parameter is here already is taken too, without gathering: it has been passed over.
        """
        free = self._zero.stage3_max_live_parameters - self._available_elements
        limit = min(free, self._zero.stage3_prefetch_bucket_size)

        names: list[str] = []
        while self._queue and sum(self._sizes[name] for name in names) < limit:
            name, used_at = self._queue.popleft()
            self._last_fetched_for[name] = max(self._last_fetched_for[name], used_at)
            if not self._is_here(name) and name not in names:
                names.append(name)

        self._gather(names)

    def _release(self, following: int, module: Module) -> None:
        """`release_sub_module`, with the two exceptions of `__params_to_release`.

        following: the index of the module that is called next.
        """
        # A parameter stays if a prefetch has passed over a later use of it: nothing would gather
        # it for that use.
        stay = {name for name in module.own if self._last_fetched_for[name] > following}

        # A parameter stays if it is used again within stage3_max_reuse_distance elements. Whether
        # the parameters of a later module's children count depends on the module that is
        # released: they do if that one is a leaf, as a block is. For any other module, a later
        # block has no parameters, since all of them belong to its linear layers.
        passed = 0
        for later in self._modules[following:]:
            if passed >= self._zero.stage3_max_reuse_distance:
                break
            if module.block is not None:
                near = later.within
            elif later.block is None:
                near = later.own
            else:
                near = {}
            stay |= near.keys()
            passed += sum(near.values())

        for name in module.own.keys() - stay:
            del self._available[name]
            self._available_elements -= self._sizes[name]

    def _memory(self) -> int:
        """Bytes of all that is gathered, and of the buffers of calls in flight."""
        buffers = {id(call): call.buffer for call in self._in_flight.values()}
        return sum(self._available.values()) + sum(buffers.values())


def modules_in_order(
    blocks: Sequence[Mapping[str, int]],
    embedding: Mapping[str, int],
    head: Mapping[str, int],
    embedding_trained: bool = False,
) -> tuple[list[Module], int]:
    """All modules of a Llama in the order of a micro-step, and the index where backward begins.

    The arguments are partitioned parameters; a tied head's has the name of the embedding's.
    Backward meets the embedding only if it is trained.
    """
    inside = {name: size for part in (embedding, *blocks) for name, size in part.items()}
    model = Module("model", {}, {**inside, **head})
    decoder = Module("decoder", {}, inside)
    table = Module("embedding", embedding, embedding)
    middle = [Module(f"block {index}", part, part, index) for index, part in enumerate(blocks)]
    norm = Module("norm", {}, {})
    last = Module("head", head, head)

    forward = [model, decoder, table, *middle, norm, last]
    backward = [model, last, norm, decoder, *reversed(middle)]
    if embedding_trained:
        backward.append(table)
    return [*forward, *backward], len(forward)
