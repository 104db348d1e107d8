"""The digest of the base weights: any change shows, and how tensors are split does not."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from minilora.files.weights_digest import BLOCK_BYTES, WeightsDigest, added

# Rows of 2500 bytes, so that neither rows nor parts end where blocks do.
WEIGHT = torch.randn(500, 1250, generator=torch.Generator().manual_seed(0)).bfloat16()
assert WEIGHT.nbytes > 100 * BLOCK_BYTES


def digest(weight: Tensor) -> int:
    whole = WeightsDigest({"w"})
    whole.add("w", 0, weight.reshape(-1))
    return whole.sums["w"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_any_split_gives_the_sum_of_the_whole(ranks: int, dtype: torch.dtype) -> None:
    flat = WEIGHT.to(dtype).reshape(-1)
    generator = random.Random(ranks)
    cuts = sorted(generator.randrange(len(flat)) for _ in range(ranks - 1))
    sums = []
    for start, end in zip([0, *cuts], [*cuts, len(flat)], strict=True):
        of_rank = WeightsDigest({"w"})
        middle = generator.randint(start, end)
        of_rank.add("w", start, flat[start:middle])
        of_rank.add("w", middle, flat[middle:end])
        sums.append(of_rank.sums)
    assert added(sums) == {"w": digest(flat)}


def test_every_change_of_one_number_shows() -> None:
    """Also that of the last bit, or of the sign, and wherever the number lies."""
    expected = digest(WEIGHT)
    for index in random.Random(1).sample(range(WEIGHT.numel()), 100):
        for bit in (0, 7, 15):
            bits = WEIGHT.view(torch.int16).clone().view(-1)
            bits[index] ^= torch.tensor(1 << bit).to(torch.int16)
            assert digest(bits.view(torch.bfloat16)) != expected, (index, bit)


def test_numbers_in_another_order_are_others() -> None:
    found = {
        digest(WEIGHT),
        digest(WEIGHT.flip(0)),
        digest(WEIGHT.flip(1)),
        digest(WEIGHT[torch.randperm(500)]),
        digest(torch.cat([WEIGHT[1:2], WEIGHT[:1], WEIGHT[2:]])),
        digest(WEIGHT.reshape(-1).roll(4 * 512)),
        digest(torch.zeros_like(WEIGHT)),
    }
    assert len(found) == 7


def test_a_rank_counts_only_what_is_its_own() -> None:
    of_rank = WeightsDigest({"other"})
    of_rank.add("w", 0, WEIGHT.reshape(-1))
    assert of_rank.sums == {}
