"""Every number of the figures, asked of the package. No other file here imports minilora.

What the package cannot say is worked out in `without_zero`, `partition` and `block_tensors`, each
with its reason.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from minilora.data.datasets import read_conversations
from minilora.data.prepare import prepare
from minilora.data.schedule import Schedule
from minilora.data.steps import Place, Span, TileLimits, build_step
from minilora.files.adapter import WEIGHTS, stored_name
from minilora.files.deepspeed_file import Facts, read_deepspeed_files
from minilora.files.model_config import read_model_config
from minilora.memory.job import MemoryJob
from minilora.memory.peak import CONTEXT, GIB, NCCL, SLACK, PeakMemory, peak_memory
from minilora.memory.ways import asked_way
from minilora.memory.zero3_gathers import Gathers, modules_in_order
from minilora.plan import USABLE
from minilora.settings.command_line import read_settings
from minilora.tiny.checkpoint import write_tiny

ROOT = Path(__file__).resolve().parent.parent.parent
RANKS, CARD_GB, SPAN_TOKENS = 7, 24, 8192
MICRO_BATCH = 4  # per_device_train_batch_size of the question
WEIGHT = "model.layers.0.self_attn.q_proj"  # the layer that figures 6 and 7 follow
ROW = 0  # of the demo's file: the one that figure 3 follows
Job = MemoryJob  # what the figures hand back to the functions below
DEMO_RANKS, DEMO_TILE = 2, 128  # tiles small enough that the demo's span has several


def article() -> Job:
    """The job of the question: what its YAML file asks for on one of seven GPUs."""
    words = [
        str(ROOT / "examples/llama31_8b_7x4090.yaml"),
        *("--model_name_or_path", str(ROOT / "examples/llama-3.1-8b")),
    ]
    settings = read_settings(words, "train")
    shape = read_model_config(settings.base).shape
    facts = Facts(RANKS, shape, bf16=True)
    ds_configs = read_deepspeed_files(settings.train, facts)
    asked, _ = asked_way(settings, shape, ds_configs, RANKS, on_gpu=True)
    return asked.job


def in_spans() -> Job:
    """The same job with gather_tokens: 8192."""
    return replace(article(), gather_tokens=SPAN_TOKENS)


def with_documents_of(job: Job, tokens: int) -> Job:
    """The same job where every document has so many tokens."""
    return replace(job, longest=tokens)


def plan(job: Job) -> PeakMemory:
    """The memory of one GPU at its peak moment."""
    return peak_memory(job)


def term(job: Job, name: str) -> int:
    """Bytes of the lines of `python -m minilora.plan --explain` whose names begin so."""
    found = [line.bytes for line in peak_memory(job).terms if line.name.startswith(name)]
    assert found, f"the plan has no line {name}"
    return sum(found)


def card() -> int:
    """Bytes of a card sold with 24 GB that a process can have."""
    return int(CARD_GB * GIB * USABLE)


def in_gib(size: float) -> float:
    """Bytes in GiB."""
    return size / GIB


def gib(size: float) -> str:
    """Bytes in GiB, as the plan writes them."""
    return f"{in_gib(size):.2f}"


def without_zero(job: Job) -> dict[str, int]:
    """Bytes by part of plain data parallelism with the Trainer's loss, at the moment of the loss.

    The package has no such run to ask, so here is the sum of the README's table: the whole model
    in bf16; LoRA's value, gradient and two moments in fp32; for one micro-batch the inputs of the
    blocks, and the logits in bf16, in fp32, and their gradient in fp32. The fixed part is
    estimated as the plan estimates its own.
    """
    shape = job.shape
    weights = sum(math.prod(size) for size in shape.parameter_shapes().values())
    lora, tokens = job.adapter.size(shape), MICRO_BATCH * job.longest
    parts = {
        "parameters": 2 * weights + 4 * lora,
        "activations": 2 * shape.num_layers * tokens * shape.hidden_size
        + (2 + 4 + 4) * tokens * shape.vocab_size,
        "optimizer states": 8 * lora,
        "accumulation": 4 * lora,
    }
    return parts | {"fixed": CONTEXT + NCCL + int(SLACK * sum(parts.values()))}


@dataclass(frozen=True)
class Held:
    """What ZeRO-3 holds while one module of the model works.

    name: such as `block 15`; arriving, held: bytes while its weights come, and then while it
    computes; ahead: whether the next block is there or on its way while this one computes.
    """

    name: str
    backward: bool
    arriving: int
    held: int
    ahead: bool


def gathers_of(job: Job) -> Gathers:
    """The gathers of one span, by DeepSpeed's rules: LoRA and norms are below the threshold."""
    shape, large = job.shape, job.zero.stage3_param_persistence_threshold
    block = {name: math.prod(size) for name, size in shape.linear_shapes().items()}
    block = {name: size for name, size in block.items() if size > large}
    blocks = [
        {f"{layer} {name}": size for name, size in block.items()}
        for layer in range(shape.num_layers)
    ]
    table = shape.vocab_size * shape.hidden_size
    order, turn = modules_in_order(blocks, {"table": table}, {"head": table})
    return Gathers(order, turn, job.zero, job.ranks)


def gathers(job: Job) -> list[Held]:
    """The moments of one span: forward through the model, then back."""
    moments = gathers_of(job).visits
    block = sum(math.prod(size) for size in job.shape.linear_shapes().values())
    return [
        Held(
            moment.module.name,
            moment.backward,
            moment.arriving * job.size,
            moment.held * job.size,
            moment.held - sum(moment.module.own.values()) >= block,
        )
        for moment in moments
    ]


def block_tensors(job: Job) -> dict[str, int]:
    """Elements per token of what autograd keeps of one recomputed block, by name.

    `minilora.memory.block` has the same list in another order; a test holds this list against it.
    """
    d, f, q, k = job.features
    low = sum(job.adapter.layers(job.shape)[path].rank for path in _paths_of_block_0(job))
    return {
        "normed 1": d,
        "q": q,
        "k": k,
        "v": k,
        "attended": q,
        "sum per head": job.shape.num_heads * 4 // job.size,  # one fp32 number of a head
        "middle": d,
        "normed 2": d,
        "gate": f,
        "up": f,
        "product": f,
        "LoRA": low,  # A x of each linear layer
    }


def _paths_of_block_0(job: Job) -> list[str]:
    return [path for path in job.adapter.layers(job.shape) if ".layers.0." in path]


@dataclass(frozen=True)
class Part:
    """What one rank reads of a tensor: elements, and the bytes from the tensor's first one on."""

    elements: int
    first_byte: int
    end_byte: int


def weight_shape(job: Job) -> tuple[int, int]:
    """Rows and columns of the weight that figure 6 follows."""
    rows, columns = job.shape.parameter_shapes()[f"{WEIGHT}.weight"]
    return rows, columns


def partition(elements: int, job: Job) -> list[Part]:
    """The part of each rank of a tensor of so many elements.

    ZeRO-3 cuts the flat tensor into equal parts, rounded up, so that the last one is shorter;
    minilora.training.engine asks DeepSpeed for these sizes, which needs a running process group.
    """
    size = -(-elements // job.ranks)
    starts = [min(elements, rank * size) for rank in range(job.ranks)]
    ends = [min(elements, start + size) for start in starts]
    bounds = zip(starts, ends, strict=True)
    return [Part(end - start, start * job.size, end * job.size) for start, end in bounds]


@dataclass(frozen=True)
class LoraB:
    """One lora_B: its shape, its scaling, and its name and file on disk."""

    rows: int
    rank: int
    scaling: float
    name: str
    file: str
    whole: bool  # whether every GPU holds all of it, being below the persistence threshold


def lora_b(job: Job) -> LoraB:
    """The lora_B that figure 7 follows."""
    layer = job.adapter.layers(job.shape)[WEIGHT]
    whole = layer.out_features * layer.rank <= job.zero.stage3_param_persistence_threshold
    name = stored_name(f"{WEIGHT}.lora_B")
    return LoraB(layer.out_features, layer.rank, layer.scaling, name, WEIGHTS, whole)


@dataclass(frozen=True)
class Sample:
    """One row of the demo's data on its way into a span.

    row: the JSON object; turns: role and text; tokens: text, id, and whether it is trained;
    span: what the rank that got it computes; start: where in the span it begins.
    """

    row: Mapping[str, str]
    turns: Sequence[tuple[str, str]]
    tokens: Sequence[tuple[str, int, bool]]
    rank: int
    span: Span
    start: int


def sample() -> Sample:
    """Read the demo's data as a run would, with the tiny checkpoint's tokenizer."""
    folder = ROOT / "examples/demo"
    words = [str(folder / "demo.yaml"), "--dataset_dir", str(folder), "--template", "llama3"]
    with tempfile.TemporaryDirectory() as tiny:
        write_tiny(tiny)
        settings = read_settings([*words, "--model_name_or_path", tiny], "train")
        shape = read_model_config(settings.base).shape
        prepared = prepare(settings, shape, colour=False)
    data, documents = settings.data, prepared.documents
    conversations, _ = read_conversations(data.dataset, data, settings.method.stage)
    ids, trained = documents[ROW]

    schedule = Schedule.of(documents.lengths, settings, DEMO_RANKS, shape.break_even_length)
    rows, limits = schedule.rows(0), TileLimits(DEMO_TILE)
    deal = [
        build_step(documents, rows, 0, schedule, Place(rank, DEMO_RANKS), limits)
        for rank in range(DEMO_RANKS)
    ]
    (rank,) = (rank for rank, step in enumerate(deal) if ROW in step.local_rows)
    (span,) = deal[rank].spans

    texts = [prepared.tokenizer.decode([token]) for token in ids.tolist()]
    return Sample(
        row=json.loads((folder / "about_minilora.json").read_text(encoding="utf-8"))[ROW],
        turns=[(turn.role, turn.text) for turn in conversations[ROW].turns],
        tokens=list(zip(texts, ids.tolist(), trained.tolist(), strict=True)),
        rank=rank,
        span=span,
        start=_start(span, ids.tolist()),
    )


def _start(span: Span, ids: list[int]) -> int:
    """Where a document lies in a span, found by its length and its tokens."""
    lengths = [length for tile in span.tiles for length in tile]
    ends, tokens = accumulate(lengths), span.token_ids.tolist()
    (start,) = (
        end - length
        for end, length in zip(ends, lengths, strict=True)
        if tokens[end - length : end] == ids
    )
    return start


def down_proj_share(job: Job) -> tuple[int, int]:
    """Multiplications per token of down_proj, and of all frozen matrices of a block."""
    sizes = {name: math.prod(size) for name, size in job.shape.linear_shapes().items()}
    return sizes["down_proj"], sum(sizes.values())
