"""The named tensors of the plan are those that are alive in the real model, one by one."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from minilora.files.model_config import shape_from_config
from minilora.memory.alive import Alive
from minilora.memory.job import MemoryJob
from minilora.memory.terms import Tensor
from minilora.memory.zero3_gathers import Module, Visit, Zero
from minilora.model.llama import Llama
from minilora.model.lora import inject
from minilora.model.lora_shape import LoraShape
from minilora.model.tiles import document_tiles
from tests.support.article import ROOT
from tests.support.commands import text_of
from tests.support.live_tensors import LiveTensors

# Each product of a number of tokens and a number of features occurs once, so that a storage's size
# tells what it is: D 72, F 170, Q 84, K 28; tiles of 100 tokens, pieces of 37, chunks of 53.
SIZES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 72,
    "intermediate_size": 170,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "vocab_size": 503,
}
BLOCK = 1  # of three: one before it has saved something, one after it is done


def job_of(changes: dict[str, Any]) -> MemoryJob:
    config = SIZES | {key: changes[key] for key in changes.keys() & SIZES.keys()}
    shape = shape_from_config(config)
    adapter = LoraShape(4, 8.0, changes.get("dropout", 0.0), tuple(shape.linear_shapes()))
    return MemoryJob(
        shape=shape,
        zero=Zero(),
        ranks=1,
        adapter=replace(adapter, use_dora=changes.get("use_dora", False)),
        bf16=False,
        keep_blocks=changes.get("keep_blocks", 0),
        tile_tokens=changes.get("tile_tokens", 100),
        gather_tokens=None,
        loss_tokens=53,
        offload_activations=False,
        step_tokens=changes.get("step_tokens", 200),
        longest=100,
        on_gpu=False,
    )


def really_alive(job: MemoryJob) -> dict[str, Counter[int]]:
    """Run forward and backward; by moment, live storages by their elements."""
    model = Llama(job.shape, job.keep_blocks)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    inject(model, job.adapter, seed=0)
    model.lm_head.chunk_rows = job.loss_tokens
    lengths = [[job.longest]] * (job.step_tokens // job.longest)
    tiles = document_tiles(job.shape, lengths, 0, torch.empty(0), job.piece)
    tokens = torch.randint(job.shape.vocab_size, (2, job.step_tokens))

    live = LiveTensors()
    block, other = model.model.layers[BLOCK], live.enter("other")
    block.register_forward_pre_hook(live.enter("forward"))
    block.register_forward_hook(other)
    block.register_full_backward_pre_hook(live.enter("recompute"))
    block.register_full_backward_hook(other)
    model.lm_head.register_forward_pre_hook(live.enter("loss"))
    model.lm_head.register_forward_hook(other)
    with live:
        model(tokens[0], tokens[1], tiles, 1.0).backward()
    return live.at_peak


def planned(job: MemoryJob, moment: str) -> list[Tensor]:
    """The tensors that the plan names for the moment."""
    name, block = ("head", None) if moment == "loss" else (f"block {BLOCK}", BLOCK)
    visit = Visit(Module(name, {}, {}, block), moment == "recompute", 0, 0, 0)
    terms = dict(Alive(job).moments(visit))[moment]
    return [tensor for term in terms for tensor in term.tensors]


def tokens_by_width(job: MemoryJob, alive: Counter[int]) -> dict[str, int]:
    """How many tokens the live tensors of each width have in all; other storages are left out."""
    d, f, q, k = job.features
    tokens = {job.span, job.tile, job.piece}
    return {
        letter: sum(count * alive[count * width] for count in tokens)
        for letter, width in (("D", d), ("F", f), ("Q", q), ("K", k))
    }


# What changes; and how many tokens of which width the plan counts beyond what is alive.
Beyond = dict[str, dict[str, int]]
CASES: dict[str, tuple[dict[str, Any], Beyond]] = {
    "one tile": ({"step_tokens": 100}, {}),
    "two tiles": ({}, {}),
    # The room for a hidden state of a piece.
    "pieces": ({"tile_tokens": 37}, {"recompute": {"D": 37}}),
    # The documents' outputs, joined, are let go before the backward of the attention kernel.
    "attention is larger": ({"intermediate_size": 40, "head_dim": 56}, {"recompute": {"Q": 100}}),
    "saved": ({"keep_blocks": 2}, {}),
    # The room for a gradient of a tile, and for a hidden state of a piece. In forward the room is
    # there for what is not counted: the work of a piece.
    "saved, pieces": (
        {"keep_blocks": 2, "tile_tokens": 37},
        {"recompute": {"D": 100 + 37}, "forward": {"D": 100 - 37, "F": -3 * 37}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_named_tensors_are_alive_and_no_others(case: str) -> None:
    changes, beyond = CASES[case]
    job = job_of(changes)
    alive = really_alive(job)
    for moment in ("forward", "loss", "recompute"):
        named = Counter[str]()
        letters = dict(zip(job.features, "DFQK", strict=True))
        for tensor in planned(job, moment):
            named[letters.get(tensor.features, "other")] += tensor.times * tensor.tokens
        for letter, tokens in tokens_by_width(job, alive[moment]).items():
            more = beyond.get(moment, {}).get(letter, 0)
            assert named[letter] == tokens + more, (moment, letter)


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"use_dora": True}], ids=str)
def test_what_pairs_save_is_alive(changes: dict[str, Any]) -> None:
    """Of several layers at a time, so that only the sums can be compared."""
    job = job_of(changes)
    alive = tokens_by_width(job, really_alive(job)["recompute"])
    widths = dict(zip("DFQK", job.features, strict=True))
    elements = sum(widths[letter] * tokens for letter, tokens in alive.items())
    if job.adapter.use_dora:
        # The output of down_proj, which is let go before the backward of swiglu.
        elements += job.tile * job.features[0]
    small = ("lora_A x, all pairs", "log-sum-exp of each head", "cos and sin")
    assert elements == sum(t.elements for t in planned(job, "recompute") if t.name not in small)


def test_each_tensor_is_made_where_the_table_says() -> None:
    """A file of minilora/model, and a name that stands in it."""
    folder = ROOT / "minilora" / "model"
    made = set()
    for changes in ({"dropout": 0.1, "use_dora": True}, {"keep_blocks": 2, "tile_tokens": 37}):
        for on_gpu in (False, True):
            job = replace(job_of(changes), on_gpu=on_gpu)
            for moment in ("forward", "loss", "recompute"):
                made |= {tensor.made for tensor in planned(job, moment) if tensor.made}
    assert len(made) > 15
    for place in made:
        file, name = place.replace(":", "").split()[:2]
        assert re.search(rf"^(def|class) {name}\b", text_of(folder / file), re.MULTILINE), place
