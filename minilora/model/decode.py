"""Answers token by token: a cache of keys and values per document, and the choice of a token."""

# Shape letters: N new tokens, M cached tokens, D model, H heads, K kv heads, E head dim,
# V vocabulary.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.model.dropout import MaskPlace
from minilora.model.llama import Llama
from minilora.model.rope import rotation


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: at temperature 0 the likeliest one, otherwise drawn with the seed.

    top_k: only among that many of the likeliest tokens (0: all); top_p: only among the likeliest
    that together reach this probability.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 42


class CachedTile:
    """Documents side by side, each a prompt and the answer so far, as a `tiles.Tile`.

    The new tokens of a document attend to its cache, the keys and values of all that came before.
    The tile's rows are the new tokens of all documents, one document after another.
    """

    pieces = (slice(None),)
    masks = MaskPlace(span_seed=0)  # of no effect: answers are computed without dropout
    graph_only = False

    def __init__(self, model: Llama, capacities: Sequence[int]) -> None:
        """capacities: for each document, the most tokens that it is going to have."""
        self.model = model
        shape = model.shape
        weight = model.lm_head.weight
        self.caches = [  # (layers, 2, K, capacity, E) each, the 2 being keys and values
            weight.new_empty(shape.num_layers, 2, shape.num_kv_heads, capacity, shape.head_dim)
            for capacity in capacities
        ]
        self.lengths = [0] * len(capacities)  # cached tokens of each document
        self.new = [0] * len(capacities)  # tokens of each document that are being computed

    @torch.inference_mode()
    def next_logits(self, new: Sequence[Sequence[int]]) -> Tensor:
        """Add tokens to every document; returns the logits after its last one, (documents, V)."""
        model = self.model
        weight = model.lm_head.weight
        self.new = [len(tokens) for tokens in new]
        ends = [length + more for length, more in zip(self.lengths, self.new, strict=True)]

        positions = torch.cat(
            [
                torch.arange(start, end, device=weight.device)
                for start, end in zip(self.lengths, ends, strict=True)
            ]
        )  # (N,)
        self.rotation = rotation(model.shape.rope, model.shape.head_dim, positions, weight.dtype)
        self.rows = slice(0, len(positions))

        token_ids = torch.tensor(
            [token for tokens in new for token in tokens], device=weight.device
        )  # (N,)
        hidden = model.model(token_ids, [self])  # (N, D); the blocks call `attend`
        self.lengths = ends

        last = torch.tensor(self.new, device=weight.device).cumsum(0) - 1
        return model.lm_head.logits(model.model.norm(hidden[last]))

    def keep_only(self, which: Sequence[int]) -> None:
        """Forget all documents but these."""
        self.caches = [self.caches[index] for index in which]
        self.lengths = [self.lengths[index] for index in which]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: (N, H, E); key, value: (N, K, E). Returns (N, H, E)."""
        documents = zip(
            query.split_with_sizes(self.new),
            key.split_with_sizes(self.new),
            value.split_with_sizes(self.new),
            strict=True,
        )
        attended = []
        for (q, k, v), cache, start in zip(documents, self.caches, self.lengths, strict=True):
            # With a past, SDPA's causal mask would let a token see too little of it. A single
            # token needs no mask.
            assert start == 0 or len(q) == 1, "a causal mask is for documents without a past"

            cache = cache[layer, :, :, : start + len(q)]  # (2, K, M, E)
            cache[:, :, start:] = torch.stack((k, v)).transpose(1, 2)
            q = q.transpose(0, 1).unsqueeze(0)  # (1, H, N, E)
            attended.append(
                F.scaled_dot_product_attention(
                    q, cache[:1], cache[1:], is_causal=start == 0, enable_gqa=True
                )
            )
        return torch.cat(attended, 2).squeeze(0).transpose(0, 1)  # (N, H, E)


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling,
    first: int = 0,
) -> Iterator[tuple[int, int]]:
    """Yield (prompt, token) as the answers grow side by side, each up to and with a stop token.

    Prompt i draws with seed + first + i: its answer does not depend on which others are there.
    """
    tile = CachedTile(model, [len(prompt) + max_new_tokens for prompt in prompts])
    device = model.lm_head.weight.device
    generators = [
        torch.Generator(device).manual_seed(sampling.seed + first + i) for i in range(len(prompts))
    ]

    # The tokens that each unfinished answer adds next: first its prompt, then what was drawn.
    new: dict[int, Sequence[int]] = dict(enumerate(prompts))
    for _ in range(max_new_tokens):
        logits = tile.next_logits(list(new.values()))
        drawn = [choose(row, sampling, generators[i]) for i, row in zip(new, logits, strict=True)]
        yield from zip(new, drawn, strict=True)

        tile.keep_only([at for at, token in enumerate(drawn) if token not in stop_ids])
        new = {i: [token] for i, token in zip(new, drawn, strict=True) if token not in stop_ids}
        if not new:
            return


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token, from its logits (V,)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    tokens, probabilities = candidates(logits, sampling)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """What may be drawn at a temperature above 0: tokens, and their probabilities in fp32.

    The order, temperature, top_k, top_p, is that of transformers' generate.
    """
    scores, tokens = logits.float().sort(descending=True)
    scores = (scores - scores[0]) / sampling.temperature
    probabilities = scores[: sampling.top_k or None].softmax(0)

    # A token is among them if those before it do not reach top_p yet: the likeliest always is.
    before = probabilities.cumsum(0) - probabilities
    probabilities = probabilities[before < sampling.top_p]
    return tokens[: len(probabilities)], probabilities / probabilities.sum()
