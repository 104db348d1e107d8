"""How much memory a run takes, worked out from its settings alone: arithmetic, no torch, no GPU.

A micro-step is walked through moment by moment. To the tensors that are alive at each (alive.py)
come those that are there all the time (below), and the moment with the most bytes is the peak.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from minilora.memory.alive import Alive, that_can_be_worst
from minilora.memory.job import MemoryJob
from minilora.memory.terms import Term
from minilora.memory.zero3_gathers import Gathers, Zero, modules_in_order
from minilora.model.llama_shape import Held, LlamaShape
from minilora.model.lora_shape import WHOLE

GIB = 2**30  # bytes

# What is no tensor of torch's is assumed, not measured: no GPU has run this code yet, and
# benchmarks/memory.py prints what replaces these numbers. On a GPU together 0.9 GiB per process:
CONTEXT = int(0.55 * GIB)  # CUDA's context with torch's kernels, and the workspace of cuBLAS
NCCL = int(0.35 * GIB)  # the buffers of its channels, where there is more than one GPU
# What torch's allocator holds unused between tensors, with expandable segments, which
# measured.expand_segments asks for. Counted without a GPU: torch's CUDA allocator was run over
# address space, with kernels that did nothing (torch 2.11, DeepSpeed 0.19.8, 20 jobs).
SLACK = 0.02  # of the tensors at the peak
HOLES = 1.5  # and where ZeRO-3 gathers, at least so many blocks, in holes that blocks leave
# Host memory of one process, assumed: Python, torch and CUDA's libraries.
PROCESS = 2 * GIB


@dataclass(frozen=True)
class PeakMemory:
    """The memory of one rank's GPU at its peak.

    terms: what it consists of; peak_moment: when it is reached, a moment and a module; by_moment:
    the most bytes of tensors at each moment; gathered: bytes of weights that are put together on
    each GPU in an optimizer step; host: memory of each machine, for all its ranks.
    """

    terms: tuple[Term, ...]
    peak_moment: str
    by_moment: dict[str, int]
    gathered: int
    host: tuple[Term, ...]

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each part, such as `activations`."""
        sums: dict[str, int] = {}
        for term in self.terms:
            sums[term.part] = sums.get(term.part, 0) + term.bytes
        return sums

    @property
    def total(self) -> int:
        """Bytes that are needed of a GPU."""
        return sum(self.parts.values())

    @property
    def tensors(self) -> int:
        """All but the fixed part: what torch.cuda.max_memory_allocated shows."""
        return self.total - self.parts.get("fixed", 0)


@functools.cache
def peak_memory(job: MemoryJob) -> PeakMemory:
    """Work out the memory of one rank."""
    resident = [*_resident(job)]
    always = sum(term.bytes for term in resident)

    # Once per step, and without activations. AdamW's step needs as much again as the optimizer
    # states: the gradients in fp32 where they are not in fp32 already, and two temporaries of
    # torch.optim.AdamW. Saving gathers one trained tensor in fp32, and puts it together.
    states = sum(term.bytes for term in resident if term.part == "optimizer states")
    largest_trained = max([*job.lora.values(), *job.whole.values()], default=0)
    by_moment = {"step": always + states, "save": always + 2 * 4 * largest_trained}

    gathers = gathers_of(job)
    alive = Alive(job)
    most, most_gathered, most_else, peak_moment = 0, 0, 0, ""
    at_peak: list[Term] = []
    for visit in that_can_be_worst(job, gathers.visits):
        for moment, terms in alive.moments(visit):
            total = always + sum(term.bytes for term in terms)
            by_moment[moment] = max(by_moment.get(moment, 0), total)
            gathered = sum(term.bytes for term in terms if term.name.startswith("gathered"))
            most_gathered = max(most_gathered, gathered)
            most_else = max(most_else, total - gathered)
            if total > most:
                most, peak_moment, at_peak = total, f"{moment}, {visit.module.name}", terms

    all_terms = [*resident, *at_peak, *_fixed(job, most, most_gathered)]
    all_terms += _of_two_streams(job, most, most_gathered, most_else)
    return PeakMemory(
        terms=tuple(term for term in all_terms if term.bytes),
        peak_moment=peak_moment,
        by_moment=by_moment,
        gathered=gathers.gathered * job.spans,
        host=tuple(_host(job)),
    )


def gathers_of(job: MemoryJob) -> Gathers:
    """The gathers of a micro-step of this job."""
    return _gathers(
        job.shape,
        job.zero,
        job.ranks,
        tuple(job.lora.items()),
        job.size,
        embedding_trained=WHOLE["embed_tokens"] in job.whole,
    )


@functools.cache
def _gathers(
    shape: LlamaShape,
    zero: Zero,
    ranks: int,
    lora: tuple[tuple[str, int], ...],
    size: int,
    embedding_trained: bool,
) -> Gathers:
    """The gathers of a micro-step; none below stage 3, and none of a rank that is alone.

    lora: the trained tensors of a block by name, in elements. size: bytes of an element that is not
    packed. Of the tensors of a block, only those above stage3_param_persistence_threshold are
    partitioned.
    """
    partitioned = zero.stage == 3 and ranks > 1
    matrices = shape.held_matrices()
    in_block: dict[str, int] = {}
    embedding: dict[str, int] = {}
    head: dict[str, int] = {}
    if partitioned:
        threshold = zero.stage3_param_persistence_threshold
        in_block = {name: count for name, count in [*matrices.items(), *lora] if count > threshold}
        embedding = {"table": shape.vocab_size * shape.hidden_size}
        head = embedding if shape.tied else {"head": embedding["table"]}

    blocks = [
        {f"{index} {name}": count for name, count in in_block.items()}
        for index in range(shape.num_layers)
    ]
    modules, backward_from = modules_in_order(blocks, embedding, head, embedding_trained)
    itemsizes = {name: size for module in modules for name in module.own}
    if shape.packed:
        packed = [f"{index} {name}" for index in range(shape.num_layers) for name in matrices]
        itemsizes |= dict.fromkeys(packed, 1)
    return Gathers(modules, backward_from, zero, ranks, itemsizes)


def _resident(job: MemoryJob) -> Iterator[Term]:
    """What is there all the time: weights, adapter, and what trains the adapter.

    At stage 3 a tensor below stage3_param_persistence_threshold is whole on every rank, and each
    rank has its shard of it besides.
    """
    zero, size = job.zero, job.size
    held = job.shape.held(size)
    base = [parameter for name, parameter in held.items() if name not in job.whole]
    trained = [*job.lora.values()] * job.shape.num_layers + [*job.whole.values()]
    trained_shard = _shard(trained, job.ranks)
    split = f"{sum(trained):,} / {job.ranks}"

    if zero.stage < 3:
        yield from _weights(base, "weights, replica", [n.elements for n in base])
        # DeepSpeed keeps fp32 masters from stage 1 on; at stage 0 the adapter itself is in fp32.
        yield Term("parameters", "LoRA, whole", sum(trained), size if zero.stage else 4)
        if zero.stage == 0 and job.bf16:
            # model/working_copies.py; the vectors of DoRA have none, and are too small to matter.
            pairs = sum(job.lora.values()) * job.shape.num_layers
            yield Term("parameters", "LoRA's copies to compute with", pairs, size)
    else:
        on_gpu = [0 if zero.offload_param else -(-n.elements // job.ranks) for n in base]
        kept = [
            part + _whole_as_well([parameter.elements], job)
            for part, parameter in zip(on_gpu, base, strict=True)
        ]
        yield from _weights(base, "weights, shard", kept, job.ranks)
        group = zero.zero_hpz_partition_size
        second = [0 if zero.offload_param else _second_shard(n.elements, job) for n in base]
        yield from _weights(base, "weights, second shard", second, group)
        split_twice = [n for n in trained if not _whole_as_well([n], job)]
        live = sum(_second_shard(n, job) for n in split_twice)
        yield Term("parameters", "second shard of what is trained", live, size)
        lora = trained_shard + _whole_as_well(trained, job)
        yield Term("parameters", "LoRA, shard and whole", lora, size)
        yield Term("accumulation", "LoRA gradients, shard", trained_shard, size, split)
        yield Term("accumulation", "reduce bucket", zero.reduce_bucket_size, size)

    moments = 2 * 4  # AdamW's exp_avg and exp_avg_sq, in fp32
    if zero.stage == 0:
        yield Term("optimizer states", "Adam moments, fp32", sum(trained), moments)
    else:
        yield Term("optimizer states", "LoRA master, fp32", trained_shard, 4, split)
        yield Term("optimizer states", "Adam moments, fp32", trained_shard, moments, split)


def _weights(
    base: Sequence[Held], name: str, kept: Sequence[int], ranks: int = 1
) -> Iterator[Term]:
    """Lines for the frozen weights: packed ones, if there are any, and the others.

    kept: elements of each that this rank holds.
    """
    for itemsize in sorted({parameter.itemsize for parameter in base}):
        of_this = [n for n, parameter in enumerate(base) if parameter.itemsize == itemsize]
        whole = sum(base[n].elements for n in of_this)
        line = f"{name}, packed" if itemsize == 1 else name
        origin = f"{whole:,} / {ranks}" if ranks > 1 else ""
        yield Term("parameters", line, sum(kept[n] for n in of_this), itemsize, origin)


def _shard(sizes: list[int], ranks: int) -> int:
    """Elements of a rank's part of tensors, each padded to a multiple of the ranks."""
    return sum(-(-size // ranks) for size in sizes)


def _second_shard(elements: int, job: MemoryJob) -> int:
    """Elements of a tensor that a rank holds once more for the ranks of its group (hpZ)."""
    group = job.zero.zero_hpz_partition_size
    return -(-elements // job.ranks) * job.ranks // group if group > 1 else 0


def _whole_as_well(sizes: list[int], job: MemoryJob) -> int:
    """Elements of the tensors that ZeRO-3 leaves whole. A rank that is alone has shards alone."""
    threshold = job.zero.stage3_param_persistence_threshold if job.ranks > 1 else 0
    return sum(size for size in sizes if size <= threshold)


def _fixed(job: MemoryJob, tensors: int, gathered: int) -> list[Term]:
    """What a GPU holds beside `tensors` bytes of tensors.

    gathered: the most bytes that ZeRO-3 gathers at a time.
    """
    if not job.on_gpu:
        return []
    communicators = (job.ranks > 1) + (job.zero.zero_hpz_partition_size > 1)
    slack = Term(
        "fixed", "allocator slack, estimate", int(SLACK * tensors), 1, f"{SLACK} x {tensors:,}"
    )
    if gathered:
        block, each = sum(job.shape.held_matrices().values()), 1 if job.shape.packed else job.size
        holes = Term(
            "fixed", "allocator slack, estimate", int(HOLES * block), each, f"{HOLES} x {block:,}"
        )
        slack = max(slack, holes, key=lambda term: term.bytes)
    return [
        Term("fixed", "CUDA context, estimate", CONTEXT, 1),
        Term("fixed", "NCCL, estimate", communicators, NCCL),
        slack,
    ]


def _of_two_streams(
    job: MemoryJob, most: int, most_gathered: int, most_else: int
) -> Iterator[Term]:
    """What torch keeps besides where ZeRO-3 gathers on a stream of its own.

    Torch keeps memory apart by stream. So the most of what is gathered and the most of all other
    tensors add up, though they are not at the same time. And what is gathered leaves a hole as
    large as the embedding, which blocks have been put into since.
    """
    if job.on_gpu and most_gathered and job.zero.overlap_comm:
        table = job.shape.vocab_size * job.shape.hidden_size * job.size
        more = max(0, most_gathered + most_else + table - most)
        yield Term("fixed", "memory of the second stream, estimate", more, 1)


def _host(job: MemoryJob) -> Iterator[Term]:
    """Memory of each machine, for all ranks on it."""
    shape, ranks = job.shape, job.ranks // job.machines
    weights = shape.held(job.size).values()

    inputs = shape.num_layers - job.keep_blocks if job.offload_activations else 0
    input_bytes = job.pinned(job.span * shape.hidden_size)
    shards = 0
    if job.zero.offload_param:
        shards = ranks * sum(
            job.pinned(elements, parameter.itemsize)
            for parameter in weights
            for elements in (
                _shard([parameter.elements], job.ranks),
                _second_shard(parameter.elements, job),
            )
            if elements
        )

    yield Term("host", "processes, estimate", ranks, PROCESS)
    yield Term("host", "block inputs, pinned", ranks * inputs, input_bytes)
    yield Term("host", "weights, pinned", shards, 1)
    files = replace(shape, packed=False)
    yield Term("host", "page cache of the files", files.held_bytes(2), 1)  # files are in bf16
