"""Which tensors are alive at each moment of a micro-step, beside those that are always there.

A moment is a part of a module's visit (zero3_gathers.Visit): `gather`, while the parameters arrive,
then `forward`, `loss` or `recompute`, which stands for all of backward, while the module computes.
tests/promises/test_fits_in_memory.py holds the sums against what torch's allocator counts.
"""

# Shape letters: N tokens of a span, D model, V vocabulary.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from minilora.memory.block import BlockMemory, rows
from minilora.memory.gradients import gradients
from minilora.memory.job import MemoryJob
from minilora.memory.terms import Tensor, Term
from minilora.memory.unpacked import Unpacked
from minilora.memory.zero3_gathers import Visit

Moment = tuple[str, list[Term]]

# Hidden states (N, D) outside of the blocks. Any token may have a label, so that the labelled rows
# are N.
LABELLED = "labelled rows"
NORMED = "labelled rows, normed"
GRADIENT = "gradient of the normed rows"
SCALED = "gradient of the normed rows, scaled"
# In the head's backward torch's CPU allocator shows LABELLED, GRADIENT and SCALED. One such tensor
# more is counted, and on a CPU two: room for the norm's backward, which follows while the head's
# weights may still be gathered.
HEAD_ROOM = "room for the norm's backward"
# On a CPU torch computes the backward of rms_norm in steps: the most that these hold at a time.
NORM_BACKWARD = (LABELLED, *(f"norm's backward, tensor {number}" for number in range(1, 6)))

# How many visits at each end of a run of blocks are looked at, see `that_can_be_worst`.
ENDS = 3


class Saved(NamedTuple):
    """What blocks have saved for their backward: inputs of blocks that recompute; whole blocks."""

    inputs: int
    blocks: int


class Alive:
    """The tensors that are alive at each moment of a job's micro-step."""

    def __init__(self, job: MemoryJob) -> None:
        self._job = job
        self._block = BlockMemory.of(job)
        self._work = {saves: Unpacked.of(job, saves) for saves in (False, True)}
        self._inputs = _inputs(job)

    def moments(self, visit: Visit) -> Iterator[Moment]:
        """The moments of a visit by name, each with its lines; some lines have no elements."""
        name = visit.module.name
        if visit.module.block is not None:
            yield from self._of_a_block(visit, visit.module.block)
        elif name == "head":
            yield from self._of_the_head(visit)
        elif name == "norm":
            yield from self._of_the_norm(visit)
        elif not visit.backward:  # of the model, the decoder or the embedding
            yield "gather", self._alive(visit, Saved(0, 0), ["embeddings"])
        elif name == "embedding":
            yield "embedding", self._alive(visit, Saved(0, 0), ["gradient of the embeddings"])
        else:
            states = ["gradient of the labelled rows", "gradient of the decoder's output"]
            yield "gather", self._alive(visit, self._saved_before(visit), states)

    def _of_a_block(self, visit: Visit, index: int) -> Iterator[Moment]:
        job, before = self._job, self._saved_before(visit)
        saves = index >= job.shape.num_layers - job.keep_blocks
        if saves:
            with_it = Saved(before.inputs, before.blocks + 1)
        else:
            with_it = Saved(before.inputs + 1, before.blocks)

        if visit.backward:
            # An offloaded input is fetched from the host when the weights are there.
            fetched_later = job.offload_activations and not saves
            states = ["gradient of the block's output"]
            yield "gather", self._alive(visit, before if fetched_later else with_it, states)
            states = ["gradient of the block's output", "gradient of the block's input"]
            work = self._work[saves]
            widest = [self._block.backward[saves], *work.in_backward]
            yield "recompute", self._alive(visit, with_it, states, widest)
            if work.backward_at_first:
                first = work.backward_at_first
                yield "recompute", self._alive(visit, with_it, states, first, first_tile=True)
            if work.backward_of_first_tile:
                first = work.backward_of_first_tile
                yield "recompute", self._alive(visit, before, states, first, first_tile=True)
        else:
            # Of a block that recomputes, the input is saved from the start.
            states = ["block's input"] if saves else []
            yield "gather", self._alive(visit, Saved(with_it.inputs, before.blocks), states)
            states = ["block's output"]
            work = self._work[saves]
            widest = [self._block.forward[saves], *work.in_forward]
            yield "forward", self._alive(visit, with_it, states, widest)
            if work.forward_at_last:
                yield "forward", self._alive(visit, with_it, states, work.forward_at_last)

    def _of_the_head(self, visit: Visit) -> Iterator[Moment]:
        job, saved = self._job, self._saved_before(visit)
        if visit.backward:
            yield "gather", self._alive(visit, saved, [LABELLED, GRADIENT, SCALED])
            states = [LABELLED, GRADIENT, SCALED, HEAD_ROOM]
            if not job.on_gpu:
                states.append(HEAD_ROOM)
            yield "recompute", self._alive(visit, saved, states)
        else:
            yield "gather", self._alive(visit, saved, [LABELLED, NORMED])
            yield "loss", self._alive(visit, saved, [LABELLED, NORMED, GRADIENT], _logits(job))

    def _of_the_norm(self, visit: Visit) -> Iterator[Moment]:
        saved = self._saved_before(visit)
        if not visit.backward:
            yield "gather", self._alive(visit, saved, ["decoder's output", LABELLED])
        elif self._job.on_gpu:
            yield "gather", self._alive(visit, saved, [LABELLED, SCALED])
        else:
            yield "recompute", self._alive(visit, saved, NORM_BACKWARD)

    def _saved_before(self, visit: Visit) -> Saved:
        """By the blocks before this one; by all of them for a module that is no block.

        Of offloaded inputs two are on the GPU: the first block's, since it is the embedding's
        output, and in backward the one that is on its way back.
        """
        job, layers = self._job, self._job.shape.num_layers
        index = layers if visit.module.block is None else visit.module.block
        first_that_saves = layers - job.keep_blocks
        inputs = min(index, first_that_saves)
        if job.offload_activations:
            inputs = min(inputs, 2 if visit.backward else 1)
        return Saved(inputs, max(0, index - first_that_saves))

    def _alive(
        self,
        visit: Visit,
        saved: Saved,
        hidden_states: Sequence[str],
        work: Sequence[Term] | None = None,
        first_tile: bool = False,
    ) -> list[Term]:
        """All lines of a moment. Without `work` the visit's parameters may be arriving still.

        first_tile: whether it is in a block's backward of its first tile.
        """
        n, size = self._job.span, self._job.size
        d = self._job.shape.hidden_size
        gathered = visit.arriving if work is None else visit.held
        # Bytes of packed weights are counted as they are, others in the elements that they have.
        each = 1 if self._job.shape.packed else size

        inputs = [Tensor("block's input", n, d, "llama.py Block", saved.inputs)]
        activations = rows(n, self._block.saved, saved.blocks) if saved.blocks else []
        states = [Tensor(name, n, d) for name in hidden_states]
        return [
            Term("parameters", f"gathered: {visit.module.name}", visit.own // each, each),
            Term("parameters", "gathered ahead, and buffers", (gathered - visit.own) // each, each),
            Term.of("block inputs saved", inputs, size),
            Term.of("activations saved", activations, size),
            Term.of("hidden states", states, size),
            *self._inputs,
            *(work or ()),
            *gradients(self._job, visit, first_tile),
        ]


def that_can_be_worst(job: MemoryJob, visits: Iterable[Visit]) -> Iterator[Visit]:
    """The visits of which one has the most memory of all, by moment too.

    In a run of blocks whose visits hold the same, each block differs from the one before by the
    same amounts: one saved input more or less, and the gradients of one block. So the most is at an
    end of the run. Only near the ends a step is another one: two offloaded inputs stay on the GPU,
    and the first block whose backward is done fills the buckets.
    """
    first_that_saves = job.shape.num_layers - job.keep_blocks

    def what_it_holds(visit: Visit) -> tuple[object, ...]:
        block = visit.module.block
        kind = visit.module.name if block is None else block >= first_that_saves
        return kind, visit.backward, visit.arriving, visit.held, visit.own

    for _, run in groupby(visits, what_it_holds):
        alike = list(run)
        yield from alike[:ENDS]
        yield from alike[max(ENDS, len(alike) - ENDS) :]


def _inputs(job: MemoryJob) -> list[Term]:
    """What the tokens of a span bring along."""
    rotary = Tensor("cos and sin", job.span, job.shape.head_dim, "rope.py rotation", times=2)
    return [
        Term("activations", "token ids and labels", 2 * job.span, 8),  # int64
        Term.of("rotary tables", [rotary], job.size),
    ]


def _logits(job: MemoryJob) -> list[Term]:
    """Logits of a chunk: in fp32, and beside them as the product gives them if that is bf16."""
    logits = Tensor("logits", job.loss_chunk, job.shape.vocab_size, "loss.py head_loss")
    terms = [Term.of("loss chunk, logits in fp32", [logits], 4)]
    if job.bf16:
        terms.append(Term.of("loss chunk, logits in bf16", [logits], job.size))
    return terms
