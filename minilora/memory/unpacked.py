"""The numbers of a block whose weights are packed to 4 bits, while it computes.

`unpacked_once` of minilora/model/matrix.py unpacks each matrix when it is first asked for, and
keeps its numbers until the block has computed all of its tiles. down_proj comes last in forward,
and first in backward. Plain torch needs scratch memory while it unpacks; on a GPU a fused kernel
needs none.
"""

from __future__ import annotations

from dataclasses import dataclass

from minilora.memory.block import (
    backward_at_unpacking,
    backward_of_attention,
    forward_at_unpacking,
    rows,
    saved_by_attention,
    saved_by_block,
)
from minilora.memory.job import MemoryJob
from minilora.memory.terms import Term
from minilora.model.nf4_shape import PIECE

NAME = "working set of a block"
LAST = "down_proj"
# nf4.py _unpack_piece, for each weight: half an int32 for its byte, and its level in fp32.
SCRATCH = 2 + 4


@dataclass(frozen=True)
class Unpacked:
    """Lines of a packed block, for the moments when it needs most; none if it is not packed.

    in_forward, in_backward: the numbers that are there beside the block's working sets.
    forward_at_last: all work when the last matrix is unpacked; backward_at_first: when the first
    one is; backward_of_first_tile: when that tile is nearly done, of a block that saved its
    activations, beside what the blocks before it save.
    """

    in_forward: tuple[Term, ...] = ()
    in_backward: tuple[Term, ...] = ()
    forward_at_last: tuple[Term, ...] = ()
    backward_at_first: tuple[Term, ...] = ()
    backward_of_first_tile: tuple[Term, ...] = ()

    @classmethod
    def of(cls, job: MemoryJob, saves: bool) -> Unpacked:
        """saves: whether the block saves its activations, or recomputes them."""
        if not job.shape.packed:
            return cls()
        whole, last = _numbers(job, {*job.shape.linear_shapes()}), _numbers(job, {LAST})
        but_last = _numbers(job, job.shape.linear_shapes().keys() - {LAST})
        at_last = Term.of(NAME, forward_at_unpacking(job, saves), job.size)
        at_first = Term.of(NAME, backward_at_unpacking(job, saves), job.size)
        scratch = _scratch(job)
        if not saves:
            # With one tile, the widest moment of its MLP is over when down_proj is unpacked.
            # The graph of a recomputed tile needs the other matrices before backward begins.
            return cls(
                in_forward=(but_last if job.span == job.tile else whole,),
                in_backward=(whole,),
                forward_at_last=(at_last, whole, scratch),
                backward_at_first=(at_first, whole, scratch),
            )
        return cls(
            in_forward=(whole,),
            # The first tile has the most saved activations, and begins with down_proj.
            in_backward=(last,),
            # With several tiles the last one has more saved, and unpacks nothing.
            forward_at_last=(at_last, whole, scratch) if job.span == job.tile else (),
            backward_at_first=(at_first, last, scratch),
            backward_of_first_tile=(*_of_first_tile(job), whole),
        )


def _of_first_tile(job: MemoryJob) -> list[Term]:
    """What the block saved but its first tile's MLP, and the backward of that tile's attention."""
    tile = [*saved_by_block(job)[:1], *saved_by_attention(job)]
    return [
        Term.of("activations saved", rows(job.span - job.tile, saved_by_block(job)), job.size),
        Term.of(NAME, [*rows(job.tile, tile), *backward_of_attention(job)], job.size),
    ]


def _numbers(job: MemoryJob, names: set[str]) -> Term:
    """The unpacked matrices of these names."""
    shapes = job.shape.linear_shapes()
    weights = sum(shapes[name][0] * shapes[name][1] for name in names)
    return Term("parameters", "block's weights, unpacked", weights, job.size)


def _scratch(job: MemoryJob) -> Term:
    """What unpacking down_proj takes beside its result."""
    rows_of_it, columns = job.shape.linear_shapes()[LAST]
    in_piece = 0 if job.on_gpu else columns * min(rows_of_it, max(1, PIECE // columns))
    return Term("parameters", "scratch of unpacking", in_piece, SCRATCH)
