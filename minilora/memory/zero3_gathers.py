"""What ZeRO-3 holds gathered at each moment of a micro-step, by DeepSpeed's own rules.

They are those of PartitionedParameterCoordinator (deepspeed/runtime/zero, 0.19): what it fetches,
what ahead of its use, what it keeps; and of all_gather_coalesced: which buffers that takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Zero:
    """A file's zero_optimization section, in elements; defaults as in deepspeed's zero/config.py.

    offload_param: whether the frozen weights lie in host memory.
    """

    stage: int = 0
    reduce_bucket_size: int = 500_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    stage3_param_persistence_threshold: int = 100_000
    overlap_comm: bool = False
    offload_param: bool = False

    @classmethod
    def of(cls, ds_config: Mapping[str, Any]) -> Zero:
        """Read a DeepSpeed configuration without "auto" values."""
        section = dict(ds_config.get("zero_optimization", {}))
        place = section.get("offload_param") or {}
        section["offload_param"] = place.get("device", "none") != "none"
        known = {item.name for item in fields(cls)} & section.keys()
        return cls(**{name: section[name] for name in known})


class Module(NamedTuple):
    """A module as DeepSpeed calls it: elements of its partitioned parameters, and of all within."""

    name: str
    own: Mapping[str, int]
    within: Mapping[str, int]
    block: int | None = None


class Moment(NamedTuple):
    """Elements held while a module's parameters arrive, and then while it computes."""

    module: Module
    backward: bool
    arriving: int
    held: int


class _Group:
    """Parameters gathered in one call: into one buffer, from which each is copied."""

    def __init__(self, sizes: Mapping[str, int], ranks: int) -> None:
        self.coming = self.sizes = sizes
        self.gathered = self.buffer = ranks * sum(-(-size // ranks) for size in sizes.values())

    def arrive(self) -> Mapping[str, int]:
        arrived, self.coming = self.coming, {}
        if len(arrived) == 1:  # one alone keeps the buffer
            arrived, self.buffer = dict.fromkeys(arrived, self.gathered), 0
        return arrived


class Gathers:
    """The moments of any micro-step but the first of a run, and the elements it gathers.

    modules: in the order of forward and backward, which begins at index `turn`.
    """

    def __init__(self, modules: Sequence[Module], turn: int, zero: Zero, ranks: int) -> None:
        self._order, self._zero, self._ranks = modules, zero, ranks
        self._sizes = {name: size for module in modules for name, size in module.own.items()}
        self._held: dict[str, int] = {}
        self._flying: dict[str, _Group] = {}
        self._queue = deque((name, at) for at, module in enumerate(modules) for name in module.own)
        self._fetched_for = dict.fromkeys(self._sizes, -1)
        self._live = self.gathered = 0
        self.moments = [Moment(m, at >= turn, *self._visit(at, m)) for at, m in enumerate(modules)]

    def _visit(self, at: int, module: Module) -> tuple[int, int]:
        self._gather([name for name in module.own if not self._here(name)])
        arriving = self._wait(module)
        new = sum(self._fetched_for[name] < at for name in module.own)
        self._fetched_for |= dict(self._queue.popleft() for _ in range(new))
        self._prefetch()
        held = self._memory()
        self._release(at + 1, module)
        return max(arriving, held), held

    def _here(self, name: str) -> bool:
        return name in self._held or name in self._flying

    def _gather(self, names: Sequence[str]) -> None:
        group = _Group({name: self._sizes[name] for name in names}, self._ranks)
        self._flying |= dict.fromkeys(names, group)
        self._live += sum(group.sizes.values())
        self.gathered += group.gathered

    def _wait(self, module: Module) -> int:
        """A group arrives as a whole; its buffer stays until its last member is asked for."""
        most = 0
        for name in module.own.keys() & self._flying.keys():
            self._held |= self._flying[name].arrive()
            most = max(most, self._memory())
            del self._flying[name]
        return most

    def _prefetch(self) -> None:
        free = self._zero.stage3_max_live_parameters - self._live
        room, names = min(free, self._zero.stage3_prefetch_bucket_size), list[str]()
        while self._queue and sum(self._sizes[name] for name in names) < room:
            name, at = self._queue.popleft()
            self._fetched_for[name] = max(self._fetched_for[name], at)
            if not self._here(name) and name not in names:
                names.append(name)
        self._gather(names)

    def _release(self, at: int, module: Module) -> None:
        """All but what prefetching passed over since it was here, and what is used again soon."""
        keep, passed = {name for name in module.own if self._fetched_for[name] > at}, 0
        for later in self._order[at:]:
            if passed >= self._zero.stage3_max_reuse_distance:
                break
            inside = {} if later.block is not None else later.own  # a block's own has its linears
            near = inside if module.block is None else later.within
            keep |= near.keys()
            passed += sum(near.values())
        for name in module.own.keys() - keep:
            del self._held[name]
            self._live -= self._sizes[name]

    def _memory(self) -> int:
        buffers = {id(group): group.buffer for group in self._flying.values()}
        return sum(self._held.values()) + sum(buffers.values())


def in_order(
    blocks: Sequence[Mapping[str, int]],
    embedding: Mapping[str, int],
    head: Mapping[str, int],
    embedding_trained: bool = False,
) -> tuple[list[Module], int]:
    """All modules of a Llama as a micro-step meets them, and where its backward begins.

    The arguments are partitioned parameters; a tied head's has the name of the embedding's.
    """
    inside = {name: size for part in (embedding, *blocks) for name, size in part.items()}
    model, decoder = Module("model", {}, {**inside, **head}), Module("decoder", {}, inside)
    middle = [Module(f"block {index}", part, part, index) for index, part in enumerate(blocks)]
    norm, last = Module("norm", {}, {}), Module("head", head, head)
    first = Module("embedding", embedding, embedding)
    forward = [model, decoder, first, *middle, norm, last]
    backward = [model, last, norm, decoder, *reversed(middle), *[first] * embedding_trained]
    return [*forward, *backward], len(forward)
