"""A digest of the base weights, taken from the bytes that are read anyway while a model is loaded.

A run that resumes must have the base weights of the run that wrote the snapshot. Any row of any
matrix may have been changed, so every byte has to count. Reading a file once more for that would
cost as much as loading it. So the digest is a sum over the bytes that pass by, and the sums of
several ranks are added: how the tensors are split over ranks and files plays no part in it.

Of each tensor the bytes are taken as 64-bit words. Each word is multiplied by an odd number that
depends on its place, and the products are added up modulo 2**64. An odd factor loses nothing, so
one changed word always changes the sum; a change of many words goes unseen once in 2**64. The sum
is made to find mistakes. It is no cryptographic hash, and nobody should rely on it as on one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Words that are multiplied by one row of factors, 4 KB: each block of them gets a factor as well.
BLOCK_WORDS = 512
BLOCK_BYTES = 8 * BLOCK_WORDS

Words = NDArray[np.uint64]


class WeightsDigest:
    """The sums of one rank over the parts of tensors that it reads.

    counted: the names of the tensors that this rank adds up. Ranks that read whole tensors, as at
    ZeRO stages below 3, share them out, so that no byte is counted twice.
    """

    def __init__(self, counted: Set[str]) -> None:
        self._counted = counted
        self._factors = _odd_numbers(np.arange(BLOCK_WORDS, dtype=np.uint64))
        self.sums: dict[str, int] = {}

    def add(self, name: str, first: int, numbers: Tensor) -> None:
        """Count a part of a tensor, as it lies in the file.

        first: the index of its first element in the flattened tensor; numbers: one-dimensional.
        Numbers that have just been read are in a cache, and a core sums 10 GB/s of them; from main
        memory it is half of that.
        """
        if name not in self._counted:
            return
        data = numbers.view(torch.uint8)
        position = first * numbers.dtype.itemsize  # in the tensor, in bytes
        done = 0
        while done < len(data):
            # A part may begin anywhere in a block. The bytes of the block that are not of this part
            # count as zeros, so the sums of its parts add up to the sum of the whole.
            block, before = divmod(position + done, BLOCK_BYTES)
            whole_blocks = 0 if before else (len(data) - done) // BLOCK_BYTES
            if whole_blocks:
                count = whole_blocks * BLOCK_BYTES
                words = data[done : done + count]
            else:
                # One block, of which this part has a beginning, a middle or an end.
                count = min(BLOCK_BYTES - before, len(data) - done)
                words = torch.zeros(BLOCK_BYTES, dtype=torch.uint8)
                words[before : before + count] = data[done : done + count]

            sum_of_words = self._sum(block, words.numpy().view(np.uint64))
            self.sums[name] = (self.sums.get(name, 0) + sum_of_words) % 2**64
            done += count

    def _sum(self, first_block: int, words: Words) -> int:
        """The sum over the words of whole blocks."""
        blocks = words.reshape(-1, BLOCK_WORDS)
        sums = np.einsum("bw,w->b", blocks, self._factors)
        # The blocks' factors are other numbers than the words': their counting starts higher.
        places = np.arange(len(blocks), dtype=np.uint64) + np.uint64(first_block + 2**32)
        return int((sums * _odd_numbers(places)).sum())


def added(sums_of_ranks: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums of whole tensors from those of all ranks."""
    total: dict[str, int] = {}
    for sums in sums_of_ranks:
        for name, value in sums.items():
            total[name] = (total.get(name, 0) + value) % 2**64
    return total


def _odd_numbers(places: Words) -> Words:
    """An odd number for each place, without a pattern that weights could have too.

    The mixing is that of SplitMix64 (Steele, Lea, Flood 2014, doi 10.1145/2660193.2660195).
    """
    mixed = (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
