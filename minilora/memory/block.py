"""The tensors of one decoder block, by name: what it saves, and what it works with.

Each table can be read beside the file of minilora/model that its rows name. Rows stand in the
order in which the tensors are made.
"""

# Shape letters: D model, F MLP, Q features of the queries, K features of the keys, R rank.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from minilora.memory.job import MemoryJob
from minilora.memory.terms import Tensor, Term

IN_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
IN_MLP = ("gate_proj", "up_proj", "down_proj")


class PerToken(NamedTuple):
    """A tensor with `features` elements for each token, in the dtype that is computed with.

    made: the file of minilora/model, and the class or function in it.
    """

    name: str
    features: int
    made: str


@dataclass(frozen=True)
class BlockMemory:
    """The tables of a job's blocks; they are the same for every block.

    forward, backward: the working set for one tile, of a block that recomputes its activations
    (False) and of a block that saves them (True).
    """

    saved: tuple[PerToken, ...]
    forward: dict[bool, Term]
    backward: dict[bool, Term]

    @classmethod
    def of(cls, job: MemoryJob) -> BlockMemory:
        line = "working set of a block"
        forward = {saves: _forward(job, saves) for saves in (False, True)}
        backward = {saves: _backward(job, saves) for saves in (False, True)}
        return cls(
            saved=tuple(saved_by_block(job)),
            forward={saves: Term.of(line, rows, job.size) for saves, rows in forward.items()},
            backward={saves: Term.of(line, rows, job.size) for saves, rows in backward.items()},
        )


def rows(tokens: int, table: Sequence[PerToken], times: int = 1) -> list[Tensor]:
    """The tensors of a table for so many tokens, of `times` blocks."""
    return [Tensor(name, tokens, features, made, times) for name, features, made in table]


def saved_by_attention(job: MemoryJob) -> list[PerToken]:
    """What autograd saves of a block's attention until its backward."""
    d, _, q, k = job.features
    sums = job.shape.num_heads * 4 // job.size  # fp32, in elements of the dtype computed with
    joined = 0 if job.on_gpu else q  # the GPU's kernel takes all documents in one call
    return [
        PerToken("block's input, normed", d, "llama.py Attention: input of q_proj, k_proj, v_proj"),
        PerToken("queries, rotated", q, "rope.py rotate"),
        PerToken("keys, rotated", k, "rope.py rotate"),
        PerToken("values", k, "llama.py Attention: v_proj"),
        *saved_by_head_norms(job),
        PerToken("attended", q, "attention.py causal_attention"),
        PerToken("log-sum-exp of each head", sums, "attention.py causal_attention"),
        PerToken("attended, documents joined", joined, "attention.py causal_attention: cat"),
        *saved_by_pairs(job, IN_ATTENTION),
    ]


def saved_by_head_norms(job: MemoryJob) -> list[PerToken]:
    """What autograd saves of the norms of queries and keys, where a family has them (Qwen3)."""
    if not job.shape.qk_norm:
        return []
    _, _, q, k = job.features
    heads = job.shape.num_heads + job.shape.num_kv_heads
    return [
        PerToken("queries before their norm", q, "llama.py Attention: q_norm"),
        PerToken("keys before their norm", k, "llama.py Attention: k_norm"),
        PerToken(
            "1 / rms of each head", heads * 4 // job.size, "llama.py Attention: q_norm, k_norm"
        ),
    ]


def saved_by_mlp(job: MemoryJob) -> list[PerToken]:
    """What autograd saves of a block's second norm and its MLP until their backward."""
    d, f, _, _ = job.features
    return [
        PerToken("MLP's input", d, "llama.py Block: residual after attention"),
        PerToken("MLP's input, normed", d, "llama.py MLP: input of gate_proj and up_proj"),
        PerToken("gate", f, "llama.py MLP: gate_proj"),
        PerToken("up", f, "llama.py MLP: up_proj"),
        PerToken("silu(gate) x up", f, "swiglu.py swiglu: input of down_proj"),
        *saved_by_pairs(job, IN_MLP),
    ]


def saved_by_pairs(job: MemoryJob, layers: Sequence[str]) -> list[PerToken]:
    """What autograd saves beside a linear layer's input for its LoRA pair, summed over `layers`."""
    lora, shapes = job.lora, job.shape.linear_shapes()
    ranks = inputs = outputs = 0
    for name in layers:
        if f"{name} lora_A" in lora:
            out_features, in_features = shapes[name]
            ranks += lora[f"{name} lora_A"] // in_features
            inputs += in_features
            outputs += out_features

    dropout, dora = job.adapter.dropout > 0, job.adapter.use_dora
    table = [PerToken("lora_A x, all pairs", ranks, "linear.py linear: `low`")]
    if dropout:
        table += [
            PerToken("dropout's mask, all pairs", inputs, "dropout.py SeededDropout"),
            PerToken("input after dropout, all pairs", inputs, "lora.py LoraLinear"),
        ]
    if dropout and dora:
        table += [PerToken("what dropout took, all pairs", inputs, "lora.py LoraLinear")]
    if dora:
        table += [PerToken("output before DoRA's scaling", outputs, "lora.py LoraLinear")]
    return table


def saved_by_block(job: MemoryJob) -> list[PerToken]:
    """What a block that saves its activations holds until its backward.

    A document longer than tile_tokens goes through the MLP in pieces, which are recomputed: then
    the MLP saves its input alone.
    """
    d = job.features[0]
    in_pieces = job.piece < job.tile
    mlp = saved_by_mlp(job)
    return [
        PerToken("block's input", d, "llama.py Block"),
        *saved_by_attention(job),
        *(mlp[:1] if in_pieces else mlp),
    ]


def _forward(job: MemoryJob, saves: bool) -> list[Tensor]:
    """The working set of forward, beside the block's input, its output and what it saves."""
    d, f, q, k = job.features
    if saves:
        output = [
            PerToken("MLP's output", d, "llama.py MLP: down_proj"),
            PerToken("tile's output", d, "llama.py Block: residual after the MLP"),
        ]
        return rows(job.tile, output)

    # Without a graph a tensor is let go after its last use, so that attention and MLP do not add
    # up: the larger one counts.
    attention = [
        PerToken("block's input, normed", d, "llama.py Attention"),
        PerToken("queries, rotated", q, "rope.py rotate"),
        PerToken("keys, rotated", k, "rope.py rotate"),
        PerToken("values", k, "llama.py Attention: v_proj"),
        *saved_by_head_norms(job),
        PerToken("attended", q, "attention.py causal_attention"),
        # On a CPU. On a GPU this stands for the queries before their rotation.
        PerToken("attended, documents joined", q, "attention.py causal_attention: cat"),
    ]
    wide = [
        PerToken("gate", f, "llama.py MLP: gate_proj"),
        PerToken("up", f, "llama.py MLP: up_proj"),
        PerToken("silu(gate) x up", f, "swiglu.py swiglu"),
    ]
    return _larger(rows(job.tile, attention), _forward_of_mlp(job, wide))


def _forward_of_mlp(job: MemoryJob, wide: Sequence[PerToken]) -> list[Tensor]:
    """In the MLP of a block that recomputes, when there are these tensors between its products."""
    d = job.features[0]
    residual = [
        PerToken("MLP's input", d, "llama.py Block: residual after attention"),
        PerToken("MLP's input, normed", d, "llama.py MLP"),
    ]
    return [*rows(job.tile, residual), *rows(job.piece, wide)]


def forward_at_unpacking(job: MemoryJob, saves: bool) -> list[Tensor]:
    """The working set of forward when down_proj is unpacked, which is before its product."""
    if saves:
        return []
    f = job.features[1]
    return _forward_of_mlp(job, [PerToken("silu(gate) x up", f, "swiglu.py swiglu")])


def backward_at_unpacking(job: MemoryJob, saves: bool) -> list[Tensor]:
    """The working set of backward when down_proj is unpacked: in the first tile, at its start."""
    one_tile = replace(job, step_tokens=job.tile)  # there is no gradient of a tile before it
    return _backward_of_mlp(one_tile, saves, wide=[])


def _backward(job: MemoryJob, saves: bool) -> list[Tensor]:
    """The working set of backward, beside the gradients of the block's output and input.

    Of a block that recomputes, all that its forward saves for a tile is part of it.
    """
    f = job.features[1]
    # At the backward of swiglu. With dropout that of down_proj takes as much.
    wide = [
        # The gradient of silu(gate) x up has the place of that product, which is let go before.
        PerToken("gradient of gate", f, "swiglu.py swiglu: backward"),
        PerToken("gradient of up", f, "swiglu.py swiglu: backward"),
    ]
    in_mlp = _backward_of_mlp(job, saves, wide)
    return in_mlp if saves else _larger(in_mlp, _backward_of_attention(job))


def _backward_of_mlp(job: MemoryJob, saves: bool, wide: Sequence[PerToken]) -> list[Tensor]:
    """In the backward of the MLP, when there are these gradients between its products."""
    d = job.features[0]
    if job.piece == job.tile:
        if saves:
            return rows(job.tile, wide)
        recomputed = [*saved_by_attention(job), *saved_by_mlp(job)]
        return rows(job.tile, [*recomputed, *wide, *_gradient_of_last_tile(job)])

    # In pieces: tensors of the whole tile, and within it the work of one piece.
    whole = [PerToken("gradient of the MLP's input", d, "recompute.py recompute: backward")]
    if saves:
        # The MLP's input is among what the block saves. Its place is counted all the same: room
        # for one more gradient of a tile.
        whole += [PerToken("room for a gradient", d, "recompute.py recompute: backward")]
    else:
        whole += [
            *saved_by_attention(job),
            PerToken("MLP's input", d, "llama.py Block: residual after attention"),
            *_gradient_of_last_tile(job),
        ]
    piece = [
        # A piece's input is a view of the tile's. Its place is counted all the same.
        PerToken("room for a hidden state", d, "recompute.py recompute: backward"),
        *saved_by_mlp(job)[1:],
        *wide,
        PerToken("gradient of the last piece's input", d, "recompute.py recompute: backward"),
    ]
    return [*rows(job.tile, whole), *rows(job.piece, piece)]


def _backward_of_attention(job: MemoryJob) -> list[Tensor]:
    """At the backward of the attention kernel, when nothing of the MLP is left."""
    return [*rows(job.tile, saved_by_attention(job)), *backward_of_attention(job)]


def backward_of_attention(job: MemoryJob) -> list[Tensor]:
    """The same, beside what attention has saved."""
    d, _, q, k = job.features
    kernel = "attention.py causal_attention: backward"
    table = [
        PerToken("gradient of attention's output", d, "llama.py Block: residual"),
        PerToken("gradient of attended", q, "linear.py linear: backward of o_proj"),
        PerToken("gradient of the queries", q, kernel),
        PerToken("gradient of the keys", k, kernel),
        PerToken("gradient of the values", k, kernel),
        *_gradient_of_last_tile(job),
    ]
    if job.on_gpu:
        # mha_varlen_bwd in torch's flash_api.cpp: dq_accum, and where heads share keys,
        # dk_expanded and dv_expanded.
        table += [PerToken("gradient of the queries, fp32", 4 * q // job.size, kernel)]
        if k < q:
            table += [
                PerToken("gradient of the keys, by head", q, kernel),
                PerToken("gradient of the values, by head", q, kernel),
            ]
    return rows(job.tile, table)


def _gradient_of_last_tile(job: MemoryJob) -> list[PerToken]:
    """It lives until the next tile's takes its name. A span that is one tile has none."""
    if job.span == job.tile:
        return []
    d = job.features[0]
    return [PerToken("gradient of the last tile's input", d, "recompute.py recompute: backward")]


def _larger(one: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    return max(one, other, key=lambda tensors: sum(tensor.elements for tensor in tensors))
