"""Answers token by token: a cache of keys and values per document, and the choice of a token."""

# Shape letters: N tokens, M kept tokens, H heads, K kv heads, E head dim, V vocabulary.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """Documents side by side whose new tokens attend to what is kept of all before them."""

    seed = 0
    pieces = (slice(None),)

    def __init__(self, model: Llama, capacities: Sequence[int]) -> None:
        self.model, shape, weight = model, model.shape, model.lm_head.weight
        self.kept = [  # keys and values of each document
            weight.new_empty(shape.num_layers, 2, shape.num_kv_heads, capacity, shape.head_dim)
            for capacity in capacities
        ]
        self.lengths, self.new = [0] * len(capacities), [0] * len(capacities)

    @torch.inference_mode()
    def next_logits(self, new: Sequence[Sequence[int]]) -> Tensor:
        """Add tokens to every document; returns the logits after its last one, (documents, V)."""
        model, device = self.model, self.model.lm_head.weight.device
        self.new = [len(tokens) for tokens in new]
        ends = [length + more for length, more in zip(self.lengths, self.new, strict=True)]
        spans = zip(self.lengths, ends, strict=True)
        positions = torch.cat([torch.arange(*span, device=device) for span in spans])
        dtype = model.lm_head.weight.dtype
        self.rotation = rotation(model.shape.rope, model.shape.head_dim, positions, dtype)
        self.rows = slice(0, len(positions))
        token_ids = torch.tensor([token for tokens in new for token in tokens], device=device)
        hidden = model.model(token_ids, [self])  # (N, D)
        self.lengths = ends
        last = torch.tensor(self.new, device=device).cumsum(0) - 1
        return model.lm_head.logits(model.model.norm(hidden[last]))

    def keep(self, which: Sequence[int]) -> None:
        """Forget the other documents."""
        self.kept = [self.kept[index] for index in which]
        self.lengths = [self.lengths[index] for index in which]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: (N, H, E); key, value: (N, K, E). Returns (N, H, E)."""
        parts = zip(
            *(tensor.split_with_sizes(self.new) for tensor in (query, key, value)), strict=True
        )
        attended = []
        for (q, k, v), kept, start in zip(parts, self.kept, self.lengths, strict=True):
            assert start == 0 or len(q) == 1, "a causal mask is for documents without a past"
            kept = kept[layer, :, :, : start + len(q)]  # (2, K, M, E)
            kept[:, :, start:] = torch.stack((k, v)).transpose(1, 2)
            q = q.transpose(0, 1).unsqueeze(0)  # (1, H, N, E)
            attended.append(
                F.scaled_dot_product_attention(
                    q, kept[:1], kept[1:], is_causal=start == 0, enable_gqa=True
                )
            )
        return torch.cat(attended, 2).squeeze(0).transpose(0, 1)


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
    new: dict[int, Sequence[int]] = dict(enumerate(prompts))
    for _ in range(max_new_tokens):
        logits = tile.next_logits(list(new.values()))
        drawn = [choose(row, sampling, generators[i]) for i, row in zip(new, logits, strict=True)]
        yield from zip(new, drawn, strict=True)
        tile.keep([at for at, token in enumerate(drawn) if token not in stop_ids])
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
    kept = probabilities.cumsum(0) - probabilities < sampling.top_p  # the likeliest always
    probabilities = probabilities[kept]
    return tokens[: len(probabilities)], probabilities / probabilities.sum()
