"""The gradients that are alive at a moment of a micro-step, by ZeRO's stage."""

from __future__ import annotations

from collections.abc import Iterator

from minilora.memory.job import MemoryJob
from minilora.memory.terms import Term
from minilora.memory.zero3_gathers import Visit
from minilora.model.lora_shape import WHOLE

PART = "accumulation"


def gradients(job: MemoryJob, visit: Visit, first_tile: bool = False) -> Iterator[Term]:
    """Those of the adapter, and of head and embedding where they are trained.

    At stage 3 the shard of all gradients and its bucket are always there, so that they are not
    counted here. From stage 1 on gradients are in the dtype that is computed with, at stage 0 in
    fp32. first_tile: whether the backward of a block is in its first tile yet.
    """
    stage, layers = job.zero.stage, job.shape.num_layers
    several_spans = job.spans > 1
    block = sum(job.lora.values())
    index = visit.module.block
    in_block = visit.backward and index is not None
    blocks_done = layers - 1 - index if visit.backward and index is not None else 0

    if in_block and job.span > job.tile and not first_tile:
        # In recompute's backward; with one tile there is nothing to sum.
        yield Term(PART, "gradients summed over tiles, fp32", block, 4)
        yield Term(PART, "gradients of the last tile", block, job.size)

    if stage == 0:
        blocks = layers if several_spans else blocks_done
        yield Term(PART, "LoRA gradients, fp32", block * blocks, 4)
    elif stage < 3:
        # Filled by the first block that is done; with overlap_comm there are two of them.
        buckets = 0
        if blocks_done:
            buckets = 2 if job.zero.overlap_comm else 1
        yield Term(PART, "reduce buckets", buckets * job.zero.reduce_bucket_size, job.size)
        shard = 0
        if several_spans:
            shard = -(-(layers * block + sum(job.whole.values())) // job.ranks)
        yield Term(PART, "LoRA gradients, shard", shard, job.size)

    if job.whole:
        yield from _whole_gradients(job, visit)


def _whole_gradients(job: MemoryJob, visit: Visit) -> Iterator[Term]:
    """Of head (V, D) and embedding (V, D), of those that are trained."""
    head = job.whole.get(WHOLE["lm_head"], 0)
    table = job.whole.get(WHOLE["embed_tokens"], 0)
    name, size = visit.module.name, job.size
    reduced = job.zero.stage > 0

    if name == "head" and not visit.backward:
        # The head's gradient is summed in fp32 over the products of chunks. A product is made when
        # the fp32 logits of its chunk are gone, if there is a copy of them in bf16.
        yield Term(PART, "head's gradient, fp32", head, 4)
        freed = job.loss_chunk * job.shape.vocab_size * 4 if job.bf16 else 0
        product = max(0, head * size - freed)
        yield Term(PART, "head's gradient, a chunk's", product, 1)
        if not reduced and job.bf16:
            # At stage 0 trained parameters are their own fp32 masters.
            yield Term("parameters", "head in bf16", head, size)
    elif visit.backward:
        elements = 0
        if name == "head":
            elements = 2 * head  # as the loss has left it, and scaled
        if name == "embedding":
            elements = 2 * table if reduced else table  # and its copy in the bucket
        yield Term(PART, "gradients of head and table, new", elements, size)

    # At stage 0 the head's gradient waits for the step. From stage 1 on it waits for the first
    # blocks of backward at least, until DeepSpeed reduces the next bucket.
    waiting = head if visit.backward and name != "head" else 0
    if not reduced:
        if job.spans > 1:
            waiting = head + table
        elif name == "embedding":
            waiting += table
    yield Term(PART, "gradients of head and table, waiting", waiting, size if reduced else 4)
