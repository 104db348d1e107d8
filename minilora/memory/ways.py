"""The same optimizer step in other ways: what each needs, and which is best on a given GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minilora.memory.job import MemoryJob, memory_job
from minilora.memory.peak import GIB, Budget, budget
from minilora.memory.zero3_gathers import Zero
from minilora.model.llama_shape import LlamaShape
from minilora.settings.settings import Settings

TILES = (2048, 4096, 8192)
GATHERS = (16384, 8192, 4096, 2048)
LOSS = 256
MARGIN = 0.95  # a recommendation leaves 5 % for what is only estimated
# What a run leaves free by itself, on a CPU and on a GPU. A machine's memory is others' too, and it
# may not swap; on a GPU context, NCCL and the allocator's slack are estimates until measured.
SPARE = {False: 0.5, True: 0.15}


@dataclass(frozen=True)
class Way:
    """One way: the DeepSpeed file's name, the settings, and what they need."""

    file: str
    setup: MemoryJob
    budget: Budget

    @property
    def blocks(self) -> str:
        """What becomes of the blocks' activations between forward and backward."""
        setup, kind = self.setup, "offloaded" if self.setup.offload_activations else "recomputed"
        keep, layers = setup.keep_blocks, setup.shape.num_layers
        return kind if keep == 0 else "kept" if keep == layers else f"{keep} kept"

    def cost(self, other: Way) -> str:
        """What this costs in speed if it takes the place of `other`."""
        mine, theirs = self.setup, other.setup
        more = self.budget.gathered - other.budget.gathered
        moved = 2 * mine.shape.num_layers * mine.step_tokens * mine.shape.hidden_size * mine.size
        costs = []
        if mine.zero.offload_param and not theirs.zero.offload_param:
            costs.append("every block comes over PCIe, twice a step")
        if mine.offload_activations and not theirs.offload_activations:
            costs.append(f"{moved / 1e9:.3g} GB a step over PCIe, beside the computation")
        if mine.keep_blocks < theirs.keep_blocks:
            costs.append(f"one more forward of {theirs.keep_blocks - mine.keep_blocks} blocks")
        if more > 0 and not costs:
            seconds = more / 1e10
            costs.append(f"{more / 1e9:.3g} GB more to gather a step, {seconds:.2g} s at 80 Gbit/s")
        if not costs and self.file != other.file:
            costs.append("nothing: no more is gathered")
        return " and ".join(costs) or "a little: smaller matrix products, and more of them"

    def changes(self, other: Way) -> list[str]:
        """The settings to write so that `other` becomes this."""
        mine, theirs = self.setup, other.setup
        # Whichever of the two settings made the other keep all blocks.
        all_kept = theirs.keep_blocks == theirs.shape.num_layers
        blocks = "disable_gradient_checkpointing: false, " * all_kept + "keep_blocks"
        values = {
            "deepspeed": (self.file, other.file),
            "gather_tokens": (mine.gather_tokens, theirs.gather_tokens),
            "tile_tokens": (mine.tile_tokens, theirs.tile_tokens),
            "loss_tokens": (mine.loss_tokens, theirs.loss_tokens),
            blocks: (mine.keep_blocks, theirs.keep_blocks),
            "offload_activations": (mine.offload_activations, theirs.offload_activations),
            "cutoff_len": (mine.longest, theirs.longest),
        }
        return [f"{key}: {new}".lower() for key, (new, old) in values.items() if new != old]


def asked_way(
    settings: Settings,
    shape: LlamaShape,
    ds_configs: Mapping[str, Mapping[str, Any]],
    ranks: int,
    on_gpu: bool,
) -> tuple[Way, dict[str, Zero]]:
    """What the settings ask for, and what each DeepSpeed file that could serve says of ZeRO.

    ds_configs: as `read_deepspeed_files` returns them, the asked one first.
    """
    files = {name: Zero.of(config) for name, config in ds_configs.items()}
    name = next(iter(files))
    job = replace(
        memory_job(settings, shape, files[name], ranks),
        bf16=settings.train.computes_in_bf16(on_gpu),
    )
    return Way(name, job, budget(job)), files


def ways(asked: Way, files: Mapping[str, Zero]) -> list[Way]:
    """All combinations of file, recomputation, offloading, gather_tokens and tile_tokens."""
    setup, found = asked.setup, []
    gathers = {n for n in (setup.gather_tokens, *GATHERS) if n and n < setup.step_tokens}
    for file, zero in files.items():
        kept = {(keep, False) for keep in (0, setup.keep_blocks, setup.shape.num_layers)}
        for keep, away in sorted({(0, True), *kept}):
            ways = replace(setup, zero=zero, keep_blocks=keep, offload_activations=away)
            for gather in (None, *sorted(gathers, reverse=True)):
                for tile in sorted({*TILES, setup.tile_tokens}):
                    if gather is None or gather >= tile:  # as the settings demand
                        new = replace(ways, gather_tokens=gather, tile_tokens=tile)
                        found.append(Way(file, new, budget(new)))
    return found


def recommended(found: Sequence[Way], limit: int) -> Way | None:
    """Of those that fit well: the least fetched, then the least computed again, the least moved."""

    def cost(option: Way) -> tuple[float, ...]:
        setup, needs = option.setup, option.budget
        moved = (setup.zero.offload_param, needs.gathered)
        again = (-setup.keep_blocks, setup.offload_activations, setup.spans)
        return (*moved, *again, abs(setup.tile_tokens - TILES[0]), needs.total)

    return min((o for o in found if o.budget.total <= MARGIN * limit), key=cost, default=None)


def keep_most_blocks(setup: MemoryJob, limit: int) -> MemoryJob:
    """The same step with the most blocks that can keep their activations and leave SPARE free.

    Where weights are not gathered, a step in spans of a tile each costs nothing; it is cut if more
    blocks can be kept then, and gather_tokens is left to us.
    """
    ways = [setup]
    if setup.gather_tokens is None and (setup.zero.stage < 3 or setup.ranks == 1):
        ways.append(replace(setup, gather_tokens=setup.tile_tokens))
    counts = range(setup.shape.num_layers, 0, -1)
    tried = (replace(way, keep_blocks=keep) for keep in counts for way in ways)
    most = (1 - SPARE[setup.on_gpu]) * limit
    return next((way for way in tried if budget(way).total <= most), setup)


def nearest_that_fit(asked: Way, files: Mapping[str, Zero], limit: int) -> list[Way]:
    """Up to three ways that fit with the fewest changes; if none does a smaller loss chunk, and
    then shorter documents are tried too."""
    setup, found = asked.setup, list[Way]()
    while not found and setup.longest >= 64:
        tried = replace(asked, setup=setup)
        found = [option for option in ways(tried, files) if option.budget.total <= limit]
        if setup.loss_tokens > LOSS:
            setup = replace(setup, loss_tokens=LOSS)
        else:
            half = setup.longest // 2
            tokens = setup.step_tokens // setup.longest * half
            setup = replace(setup, longest=half, step_tokens=tokens)
    return sorted(found, key=lambda o: (len(o.changes(asked)), o.budget.gathered))[:3]


def longest_document(setup: MemoryJob, limit: int) -> int:
    """Most tokens of a document that fits with a gather of each block for itself alone."""
    low, high = 0, 2**21
    while high - low > 64:
        middle = (low + high) // 2
        alone = replace(setup, step_tokens=middle, longest=middle)
        low, high = (middle, high) if budget(alone).total <= limit else (low, middle)
    return low


def advice(asked: Way, files: Mapping[str, Zero], phase: str, limit: int) -> list[str]:
    """The three changes of one setting that save most in a phase, then those that save elsewhere.

    Of each setting the mildest value is taken that brings it a tenth below the limit and below
    what was planned, if one does. Kept activations are given up before anything else is.
    """

    def powers(least: int, below: int) -> list[int]:
        return [2**n for n in reversed(range(40)) if least <= 2**n < below]

    def there(option: Way) -> int:
        return option.budget.phases.get(phase, option.budget.total)

    setup, goal = asked.setup, 0.9 * min(limit, there(asked))
    bare, layers = replace(setup, keep_blocks=0), setup.keep_blocks
    smaller: dict[str, list[Any]] = {  # mildest first
        "gather_tokens": powers(setup.tile_tokens, setup.span),
        "tile_tokens": powers(128, setup.tile),
        "loss_tokens": powers(64, min(setup.loss_tokens, setup.span)),
        "offload_activations": [True] * (not setup.offload_activations),
    }
    tries = [
        [(asked.file, replace(bare, **{key: value})) for value in values]
        for key, values in smaller.items()
    ]
    fewer = dict.fromkeys((3 * layers // 4, layers // 2, layers // 4) if layers else ())
    tries += [[(asked.file, replace(setup, keep_blocks=keep)) for keep in fewer]]
    tries += [[(name, replace(setup, zero=zero))] for name, zero in files.items()]
    saving = list[tuple[int, int, Way]]()
    for tried in tries:
        made = [Way(file, way, budget(way)) for file, way in tried]
        enough = [option for option in made if there(option) <= goal]
        for option in enough[:1] or sorted(made, key=there)[:1]:
            saved = there(asked) - there(option), asked.budget.total - option.budget.total
            saving += [(*saved, option)] * (saved[0] >= 0 and max(saved) > 0)
    saving.sort(key=lambda found: found[:2], reverse=True)
    return [
        f"{', '.join(option.changes(asked))} saves {(here or elsewhere) / GIB:.3g} GiB"
        f"{'' if here else ' in other phases'}, costs {option.cost(asked)}"
        for here, elsewhere, option in saving[:3]
    ]
