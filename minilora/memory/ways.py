"""The same optimizer step in other ways: what each needs, and which are worth naming.

`variants` makes them; what follows it are selections.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from minilora.memory.job import MemoryJob, memory_job
from minilora.memory.peak import GIB, PeakMemory, peak_memory
from minilora.memory.traffic import Links, exchanged_bytes, traffic, waited_for
from minilora.memory.zero3_gathers import Zero
from minilora.model.llama_shape import LlamaShape
from minilora.settings.settings import Settings

# Values of tile_tokens that are compared: the default of the setting, twice and four times as much.
# Larger products are hardly faster, and the working set of a block grows with them.
TILES = (2048, 4096, 8192)
# Values of gather_tokens that are compared: each half of the one before, down to the default tile,
# below which the settings allow none.
GATHERS = (16384, 8192, 4096, 2048)
# A smaller loss_tokens, a quarter of the default, which is tried before shorter documents are.
LOSS = 256
# A recommendation leaves 5 % of the GPU free: CONTEXT, NCCL and SLACK of peak.py are assumptions,
# and this is what they may be wrong by together.
MARGIN = 0.95
# A link of 80 Gbit/s into a GPU brings so many bytes a second. It is the default of plan's
# --link_gbps.
BYTES_PER_SECOND = 1e10


@dataclass(frozen=True)
class Way:
    """One way to compute the step: the DeepSpeed file's name, and the job that it makes."""

    file: str
    job: MemoryJob

    @property
    def peak(self) -> PeakMemory:
        """What this way needs."""
        return peak_memory(self.job)

    @property
    def blocks(self) -> str:
        """What becomes of the blocks' activations between forward and backward."""
        saving, layers = self.job.keep_blocks, self.job.shape.num_layers
        if saving == 0:
            return "offloaded" if self.job.offload_activations else "recomputed"
        return "saved" if saving == layers else f"{saving} saved"

    def cost(self, other: Way) -> str:
        """What this costs in speed if it takes the place of `other`."""
        mine, theirs = self.job, other.job
        costs = []
        if mine.zero.offload_param and not theirs.zero.offload_param:
            costs.append("every block comes over PCIe, twice a step")
        if mine.offload_activations and not theirs.offload_activations:
            inputs = mine.shape.num_layers * mine.step_tokens * mine.shape.hidden_size * mine.size
            moved = 2 * inputs  # out in forward, back in backward
            costs.append(f"{moved / 1e9:.3g} GB a step over PCIe, beside the computation")
        if mine.keep_blocks < theirs.keep_blocks:
            costs.append(f"one more forward of {theirs.keep_blocks - mine.keep_blocks} blocks")
        if costs:
            return " and ".join(costs)

        more = traffic(mine).among_all - traffic(theirs).among_all
        if more > 0 and theirs.zero.zero_hpz_partition_size > 1:
            return f"{more / 1e9:.3g} GB more from other machines a step"
        more = self.peak.gathered - other.peak.gathered
        if more > 0:
            seconds = more / BYTES_PER_SECOND
            return f"{more / 1e9:.3g} GB more to gather a step, {seconds:.2g} s at 80 Gbit/s"
        if self.file != other.file:
            return "nothing: no more is gathered"
        return "a little: smaller matrix products, and more of them"

    def changes(self, other: Way) -> list[str]:
        """The settings to write so that `other` becomes this."""
        mine, theirs = self.job, other.job
        blocks = "keep_blocks"
        if theirs.keep_blocks == theirs.shape.num_layers:
            # It may have been either setting that made the other save all blocks.
            blocks = "disable_gradient_checkpointing: false, keep_blocks"
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
    machines: int = 1,
) -> tuple[Way, dict[str, Zero]]:
    """What the settings ask for, and what each DeepSpeed file that could serve says of ZeRO.

    ds_configs: as `read_deepspeed_files` returns them, the asked one first. ranks: of all machines.
    """
    files = {name: Zero.of(config) for name, config in ds_configs.items()}
    name = next(iter(files))
    job = memory_job(settings, shape, files[name], ranks)
    bf16 = settings.train.computes_in_bf16(on_gpu)
    return Way(name, replace(job, bf16=bf16, machines=machines)), files


def variants(job: MemoryJob, **choices: Iterable[Any]) -> Iterator[MemoryJob]:
    """The job with every combination of the values, by field; the last field changes fastest."""
    for values in product(*choices.values()):
        yield replace(job, **dict(zip(choices, values, strict=True)))


def ways(asked: Way, files: Mapping[str, Zero]) -> list[Way]:
    """What the plan compares: files, what becomes of activations, gather_tokens and tile_tokens."""
    job = asked.job
    shorter = {n for n in (job.gather_tokens, *GATHERS) if n and n < job.step_tokens}
    return [
        Way(file, variant)
        for file, zero in files.items()
        for variant in variants(
            replace(job, zero=zero),
            keep_blocks=sorted({0, job.keep_blocks, job.shape.num_layers}),
            offload_activations=(False, True),
            gather_tokens=(None, *sorted(shorter, reverse=True)),
            tile_tokens=sorted({*TILES, job.tile_tokens}),
        )
        if _is_compared(variant)
    ]


def _is_compared(job: MemoryJob) -> bool:
    """Offloading is compared for itself, and the settings want gather_tokens >= tile_tokens."""
    offloads_and_saves = job.offload_activations and job.keep_blocks > 0
    span_holds_tile = job.gather_tokens is None or job.gather_tokens >= job.tile_tokens
    return span_holds_tile and not offloads_and_saves


def recommended(found: Sequence[Way], limit: int, links: Links | None = None) -> Way | None:
    """The fastest of those that leave some memory free, or None if none does.

    What costs most time is compared first: weights that come from the host, the time to gather,
    blocks that are recomputed, inputs that are moved to the host, gradients that are exchanged.
    """
    speeds = links or Links()

    def cost(way: Way) -> tuple[float, ...]:
        job = way.job
        return (
            job.zero.offload_param,
            waited_for(job, speeds),
            -job.keep_blocks,
            job.offload_activations,
            exchanged_bytes(job),
            job.spans,
            abs(job.tile_tokens - TILES[0]),
            way.peak.total,
        )

    return min((way for way in found if way.peak.total <= MARGIN * limit), key=cost, default=None)


def nearest_that_fit(asked: Way, files: Mapping[str, Zero], limit: int) -> list[Way]:
    """Up to three ways that fit, those with the fewest changes first.

    If none fits, a smaller loss chunk is tried too, and then shorter and shorter documents.
    """
    found: list[Way] = []
    job = asked.job
    while not found and job.longest >= 64:
        compared = ways(Way(asked.file, job), files)
        found = [way for way in compared if way.peak.total <= limit]
        if job.loss_tokens > LOSS:
            job = replace(job, loss_tokens=LOSS)
        else:
            half = job.longest // 2
            documents = job.step_tokens // job.longest
            job = replace(job, longest=half, step_tokens=documents * half)
    return sorted(found, key=lambda way: (len(way.changes(asked)), way.peak.gathered))[:3]


def longest_document(job: MemoryJob, limit: int) -> int:
    """Most tokens of a document that fits, alone in its span; to 64 tokens."""
    fits, too_long = 0, 2**21
    while too_long - fits > 64:
        middle = (fits + too_long) // 2
        alone = replace(job, step_tokens=middle, longest=middle)
        if peak_memory(alone).total <= limit:
            fits = middle
        else:
            too_long = middle
    return fits


def advice(asked: Way, files: Mapping[str, Zero], moment: str, limit: int) -> list[str]:
    """The three changes of one setting that save most at a moment, then those that save elsewhere.

    Of each setting the mildest value is taken that brings the moment a tenth below the limit, and a
    tenth below what was planned; if there is none, the value that needs least. Where some blocks
    save their activations, that is given up before anything else is changed.
    """

    def there(way: Way) -> int:
        return way.peak.by_moment.get(moment, way.peak.total)

    goal = 0.9 * min(limit, there(asked))
    savings = []
    for tried in _single_changes(asked, files):
        enough = (way for way in tried if there(way) <= goal)
        way = next(enough, None) or min(tried, key=there)
        here = there(asked) - there(way)
        elsewhere = asked.peak.total - way.peak.total
        if here >= 0 and max(here, elsewhere) > 0:
            savings.append((here, elsewhere, way))

    savings.sort(key=lambda saving: saving[:2], reverse=True)
    return [
        f"{', '.join(way.changes(asked))} saves {(here or elsewhere) / GIB:.3g} GiB"
        f"{'' if here else ' at other moments'}, costs {way.cost(asked)}"
        for here, elsewhere, way in savings[:3]
    ]


def _single_changes(asked: Way, files: Mapping[str, Zero]) -> Iterator[list[Way]]:
    """For each setting that could save memory the ways that change it, the mildest first."""
    job = asked.job
    values: dict[str, Sequence[Any]] = {
        "gather_tokens": _powers_of_two(job.tile_tokens, job.span),
        "tile_tokens": _powers_of_two(128, job.tile),
        "loss_tokens": _powers_of_two(64, job.loss_chunk),
        "offload_activations": [] if job.offload_activations else [True],
    }
    changed = [[*variants(job, keep_blocks=[0], **{key: tried})] for key, tried in values.items()]

    saving = job.keep_blocks
    if saving:
        fewer = dict.fromkeys([3 * saving // 4, saving // 2, saving // 4])
        changed.append([*variants(job, keep_blocks=fewer)])

    for jobs in changed:
        if jobs:
            yield [Way(asked.file, variant) for variant in jobs]
    for file, zero in files.items():
        yield [Way(file, replace(job, zero=zero))]


def _powers_of_two(least: int, below: int) -> list[int]:
    """Those in [least, below), the largest first."""
    return [2**n for n in reversed(range(40)) if least <= 2**n < below]
