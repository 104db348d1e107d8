"""How much memory a run takes, worked out from its settings alone: arithmetic, no torch, no GPU.

What is alive when is read off minilora/model line by line, and off DeepSpeed's optimizers;
tests/promises/test_fits_in_memory.py holds it against what torch's allocator counts.
"""

# Shape letters: D model, F MLP, Q query and K key features, N tokens.

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from minilora.memory.job import MemoryJob
from minilora.memory.zero3_gathers import Gathers, Moment, Zero, in_order
from minilora.model.llama_shape import LlamaShape
from minilora.model.lora_shape import WHOLE

GIB = 2**30
# Estimates, until benchmarks/memory.py has measured them on a GPU.
CONTEXT = int(0.55 * GIB)  # CUDA context with torch's kernels, cuBLAS workspace
NCCL = int(0.35 * GIB)  # its channels, where there is more than one GPU
SLACK = 0.03  # of the tensors: what the allocator holds in between, with expandable segments
PROCESS = 2 * GIB  # host memory of a process: Python, torch, CUDA's libraries


@dataclass(frozen=True)
class Term:
    """A line of the table: `count` numbers or tokens of `each` bytes, and how the count came about.

    part: parameters, activations, optimizer states, accumulation, fixed or host.
    """

    part: str
    name: str
    count: int
    each: int
    origin: str = ""

    @property
    def bytes(self) -> int:
        return self.count * self.each

    @property
    def formula(self) -> str:
        return f"{self.origin or format(self.count, ',')} x {self.each:,} B"


@dataclass(frozen=True)
class Budget:
    """A GPU at its fullest moment, term by term; the most tensor bytes in each phase.

    gathered: bytes of weights put together per optimizer step on each GPU; host: of the machine.
    """

    terms: tuple[Term, ...]
    fullest: str
    phases: dict[str, int]
    gathered: int
    host: tuple[Term, ...]

    @property
    def parts(self) -> dict[str, int]:
        names = dict.fromkeys(term.part for term in self.terms)
        return {name: sum(t.bytes for t in self.terms if t.part == name) for name in names}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def tensors(self) -> int:
        """All but the fixed part: what torch.cuda.max_memory_allocated shows."""
        return self.total - self.parts.get("fixed", 0)


@functools.cache
def budget(setup: MemoryJob) -> Budget:
    """Work out the memory of one rank."""
    static = [*_static(setup)]
    trained = tuple(setup.lora.items()), WHOLE["embed_tokens"] in setup.whole
    gathers = _gathers(setup.shape, setup.zero, setup.ranks, *trained)
    always = sum(term.bytes for term in static)
    # The optimizer's temporaries: the gradient in fp32 and two of AdamW's.
    states = sum(term.bytes for term in static if term.part == "optimizer states")
    saving = 8 * max(*setup.lora.values(), *setup.whole.values(), 0, 0)  # fp32, gathered and whole
    phases, most = {"step": always + states, "save": always + saving}, 0
    fullest, live = "", list[Term]()
    for moment in gathers.moments:
        for phase, terms in _at(setup, moment):
            total = always + sum(term.bytes for term in terms)
            phases[phase] = max(phases.get(phase, 0), total)
            if total > most:
                most, fullest, live = total, f"{phase}, {moment.module.name}", terms
    fixed = setup.on_gpu * (
        Term("fixed", "CUDA context, estimate", CONTEXT, 1),
        Term("fixed", "NCCL, estimate", NCCL * (setup.ranks > 1), 1),
        Term("fixed", "allocator slack, estimate", int(SLACK * most), 1, f"{SLACK} x {most:,}"),
    )
    all_terms = tuple(term for term in (*static, *live, *fixed) if term.bytes)
    gathered = gathers.gathered * setup.size * setup.spans
    return Budget(all_terms, fullest, phases, gathered, tuple(_host(setup)))


@functools.cache
def _gathers(
    shape: LlamaShape, zero: Zero, ranks: int, lora: tuple[tuple[str, int], ...], table: bool
) -> Gathers:
    """Everything above the threshold is partitioned; below stage 3, and alone, nothing is.

    table: whether the embedding is trained.
    """
    split, layers = zero.stage == 3 and ranks > 1, range(shape.num_layers)
    block = {name: rows * columns for name, (rows, columns) in shape.linear_shapes().items()}
    large = {
        name: size
        for name, size in {**block, **dict(lora)}.items()
        if split and size > zero.stage3_param_persistence_threshold
    }
    rows = {"table": shape.vocab_size * shape.hidden_size} if split else {}
    head = rows if shape.tied or not split else {"head": rows["table"]}
    blocks = [{f"{index} {name}": size for name, size in large.items()} for index in layers]
    return Gathers(*in_order(blocks, rows, head, table), zero, ranks)


def _sizes(shape: LlamaShape) -> dict[str, int]:
    return {name: math.prod(size) for name, size in shape.parameter_shapes().items()}


def _static(setup: MemoryJob) -> Iterator[Term]:
    """Weights, LoRA and what trains it; at stage 3 small tensors are whole beside their shards."""
    zero, ranks, s = setup.zero, setup.ranks, setup.size
    base = [size for name, size in _sizes(setup.shape).items() if name not in setup.whole]
    lora = [*setup.lora.values()] * setup.shape.num_layers + [*setup.whole.values()]
    below = zero.stage3_param_persistence_threshold if ranks > 1 else 0
    shards, wholes = [], []
    for sizes in (base, lora):
        shards.append(sum(-(-size // ranks) for size in sizes))
        wholes.append(sum(size for size in sizes if size <= below))
    here, part = shards[0] * (not zero.offload_param) + wholes[0], f"{sum(lora):,} / {ranks}"
    if zero.stage < 3:
        yield Term("parameters", "weights, replica", sum(base), s)
        yield Term("parameters", "LoRA, whole", sum(lora), s if zero.stage else 4)
    else:
        yield Term("parameters", "weights, shard", here, s, f"{sum(base):,} / {ranks}")
        yield Term("parameters", "LoRA, shard and whole", shards[1] + wholes[1], s)
        yield Term("accumulation", "LoRA gradients, shard", shards[1], s, part)
        yield Term("accumulation", "reduce bucket", zero.reduce_bucket_size, s)
    if zero.stage == 0:
        yield Term("optimizer states", "Adam moments, fp32", sum(lora), 8)
    else:
        yield Term("optimizer states", "LoRA master, fp32", shards[1], 4, part)
        yield Term("optimizer states", "Adam moments, fp32", shards[1], 8, part)


def _at(setup: MemoryJob, moment: Moment) -> Iterator[tuple[str, list[Term]]]:
    """What is alive beside the static terms while parameters arrive, and while they are used.

    Counted are blocks whose inputs are saved (offloaded, the first one's and those on their way
    back), blocks whose activations are, and hidden states (N, D): outputs and gradients.
    """
    module, away, on_gpu = moment.module, setup.offload_activations, setup.on_gpu
    first = setup.shape.num_layers - setup.keep_blocks  # of those that keep their activations
    block = setup.shape.num_layers if module.block is None else module.block
    inputs, kept = min(block, first), max(0, block - first)
    inputs = min(inputs, 1 + moment.backward) if away else inputs
    keeps = module.block is not None and block >= first
    saved, now = (inputs, kept), (inputs + (not keeps), kept + keeps)
    if module.block is not None and moment.backward:
        yield "gather", _live(setup, moment, saved if away and not keeps else now, 1)
        yield "recompute", _live(setup, moment, now, 2, _backward(setup, keeps))
    elif module.block is not None:
        yield "gather", _live(setup, moment, (now[0], kept), int(keeps))
        yield "forward", _live(setup, moment, now, 1, _forward(setup, keeps))
    elif module.name == "head" and not moment.backward:
        yield "gather", _live(setup, moment, saved, 2)
        yield "loss", _live(setup, moment, saved, 3, _loss(setup))
    elif module.name == "norm" and moment.backward and not setup.on_gpu:
        yield "recompute", _live(setup, moment, saved, 6)  # no fused kernel
    elif module.name != "embedding" and (moment.backward or module.name == "norm"):
        yield "gather", _live(setup, moment, saved, 3 if module.name == "head" else 2)
        if module.name == "head":  # labelled rows, their gradient twice; the CPU's norm keeps one
            yield "recompute", _live(setup, moment, saved, 5 - on_gpu)
    else:
        yield "embedding" if moment.backward else "gather", _live(setup, moment, (0, 0), 1)


def _live(
    setup: MemoryJob, moment: Moment, saved: tuple[int, int], rows: int, work: Term | None = None
) -> list[Term]:
    """Terms of blocks' inputs and of blocks' activations, `rows` hidden states, the work begun."""
    n, s, d, own = setup.span, setup.size, setup.shape.hidden_size, sum(moment.module.own.values())
    attention, mlp = setup.kept
    each = d + attention + (mlp if setup.piece == setup.tile else d)
    ahead = (moment.held if work else moment.arriving) - own
    (inputs, kept), states = saved, f"{rows} x {n:,} tokens x {d:,}"
    return [
        Term("parameters", f"gathered: {moment.module.name}", own, s),
        Term("parameters", "gathered ahead, and buffers", ahead, s),
        Term("activations", "block inputs saved", inputs * n * d, s,
             f"{inputs} blocks x {n:,} tokens x {d:,}"),
        Term("activations", "activations kept", kept * n * each, s,
             f"{kept} blocks x {n:,} tokens x {each:,}"),
        Term("activations", "hidden states", rows * n * d, s, states),
        Term("activations", "ids, labels, rotary tables", n, 2 * setup.shape.head_dim * s + 16),
        *([work] if work else []),
        *_gradients(setup, moment),
    ]  # fmt: skip


def _forward(setup: MemoryJob, keeps: bool) -> Term:
    """Without a graph, the fuller of rotating queries, and residual, normed, three of the MLP."""
    d, f, q, k = setup.features
    each = ((2 * d, 0),) if keeps else ((d + 3 * q + 2 * k, 0), (2 * d, 3 * f))
    return _work(setup, "block's working set", *each)


def _backward(setup: MemoryJob, keeps: bool) -> Term:
    """What is kept, and at the fuller moment: two gradients in the MLP, or attention's backward."""
    (d, f, q, k), (attention, mlp) = setup.features, setup.kept
    pieces, last = setup.piece < setup.tile, d * (setup.span > setup.tile)
    if keeps:
        again = (2 * d, mlp + 2 * f + d) if pieces else (0, 2 * f)
        return _work(setup, "MLP's gradients", again)
    within = (attention + (2 * d + last) * pieces, mlp + 2 * f + (d if pieces else last))
    # Gradients of output, q, k and v; the flash kernel's fp32 sum, its k and v per query head.
    flash = (4 * q // setup.size + 2 * q * (k < q)) * setup.on_gpu
    beside = (attention + d + last + 2 * q + 2 * k + flash, 0)
    return _work(setup, "block's working set, recomputed", within, beside)


def _work(setup: MemoryJob, name: str, *each: tuple[int, int]) -> Term:
    """The larger of some working sets, given in elements per token of a tile and of a piece."""
    n, p = setup.tile, setup.piece
    tile, piece = max(each, key=lambda pair: n * pair[0] + p * pair[1])
    origin = f"({n:,} tokens x {tile:,} + {p:,} x {piece:,})"
    return Term("activations", name, n * tile + p * piece, setup.size, origin)


def _loss(setup: MemoryJob) -> Term:
    """The logits of a chunk in fp32, and beside them as they are computed with if that is bf16."""
    rows, vocab = min(setup.loss_tokens, setup.span), setup.shape.vocab_size
    each = 4 + setup.size * setup.bf16
    return Term("activations", "loss chunk", rows * vocab, each, f"{rows:,} tokens x {vocab:,}")


def _gradients(setup: MemoryJob, moment: Moment) -> Iterator[Term]:
    """Those of blocks that are done, or of all once a span is done; from stage 1 in buckets."""
    zero, layers, more = setup.zero, setup.shape.num_layers, setup.spans > 1
    block, index = sum(setup.lora.values()), moment.module.block
    done = layers - 1 - index if moment.backward and index is not None else 0
    if moment.backward and index is not None and setup.span > setup.tile:
        each = 4 + (setup.size if zero.stage else 4)
        yield Term("accumulation", "sums over tiles, and the last tile's", block, each)
    if zero.stage == 0:
        yield Term("accumulation", "LoRA gradients, fp32", block * (layers if more else done), 4)
    elif zero.stage < 3:
        bucket = (1 + zero.overlap_comm) * zero.reduce_bucket_size * (done > 0)
        yield Term("accumulation", "reduce buckets", bucket, setup.size)
        shard = -(-(layers * block + sum(setup.whole.values())) // setup.ranks) * more
        yield Term("accumulation", "LoRA gradients, shard", shard, setup.size)
    if setup.whole:
        yield from _whole_gradients(setup, moment)


def _whole_gradients(setup: MemoryJob, moment: Moment) -> Iterator[Term]:
    """Those of head and table where they are trained.

    The head's is made in the loss, summed in fp32 from the products of chunks; each product comes
    when of the logits only their gradient is left. It stays: until the step at stage 0, and else
    for the first blocks of backward at least, until DeepSpeed's next reduction.
    """
    head, table = (setup.whole.get(WHOLE[name], 0) for name in ("lm_head", "embed_tokens"))
    name, s, reduced = moment.module.name, setup.size, setup.zero.stage > 0
    if name == "head" and not moment.backward:
        gone = min(setup.loss_tokens, setup.span) * setup.shape.vocab_size * 4 * setup.bf16
        yield Term("accumulation", "head's gradient, fp32", head, 4)
        yield Term("accumulation", "head's gradient, a chunk's", max(0, head * s - gone), 1)
        if not reduced and setup.bf16:
            yield Term("parameters", "head in bf16", head, s)
    elif moment.backward:
        made = 2 * head * (name == "head") + (1 + reduced) * table * (name == "embedding")
        yield Term("accumulation", "gradients of head and table, made", made, s)
    kept = head * (moment.backward and name != "head")
    if not reduced:
        kept = head + table if setup.spans > 1 else kept + table * (name == "embedding")
    yield Term("accumulation", "gradients of head and table, kept", kept, s if reduced else 4)


def _host(setup: MemoryJob) -> Iterator[Term]:
    shape, ranks, sizes = setup.shape, setup.ranks, _sizes(setup.shape).values()
    recomputed = (shape.num_layers - setup.keep_blocks) * setup.offload_activations
    each = setup.pinned(setup.span * shape.hidden_size)
    shards = ranks * sum(setup.pinned(-(-size // ranks)) for size in sizes)
    yield Term("host", "processes, estimate", ranks, PROCESS)
    yield Term("host", "block inputs, pinned", ranks * recomputed, each)
    yield Term("host", "weights, pinned", shards * setup.zero.offload_param, 1)
    yield Term("host", "page cache of the files", sum(sizes), 2)
