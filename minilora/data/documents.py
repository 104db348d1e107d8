"""Tokenised documents, laid end to end, as files that all processes of a machine share.

Shape letters: T tokens of all documents, n documents, N tokens of one document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PARTS = ("tokens", "trained", "offsets")  # of Documents, and their files


Int32s = NDArray[np.int32]


Int64s = NDArray[np.int64]


Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Documents:
    """All tokenised documents, end to end.

    tokens: (T,) int32. trained: (T,) bool, whether the token is a target of the loss.
    offsets: (n+1,) int64, where each document starts, and T.
    """

    tokens: Int32s
    trained: Bools
    offsets: Int64s

    @classmethod
    def of(cls, encoded: Sequence[tuple[Int32s, Bools]]) -> Documents:
        """Lay (token_ids, trained) pairs end to end."""
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids, _ in encoded], out=offsets[1:])
        tokens = np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in encoded)])
        trained = np.concatenate([np.empty(0, np.bool_), *(mask for _, mask in encoded)])
        return cls(tokens.astype(np.int32, copy=False), trained, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[Int32s, Bools]:
        """Tokens of one document and whether each is trained: (N,) int32, (N,) bool."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[part], self.trained[part]

    @property
    def lengths(self) -> Int64s:
        """Tokens per document: (n,) int64."""
        return np.diff(self.offsets)

    @property
    def labelled(self) -> Int64s:
        """Targets per document: (n,) int64. The first token of a document is never a target."""
        starts = self.offsets[:-1]  # no document is empty, or its sum would be another's
        return np.add.reduceat(self.trained, starts, dtype=np.int64) - self.trained[starts]

    def fingerprint(self) -> str:
        """A digest of every token, mask and boundary: a resumed run sees whether data changed."""
        digest = hashlib.sha256()
        for name in PARTS:
            digest.update(np.ascontiguousarray(getattr(self, name)).data)
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write tokens.npy, trained.npy and offsets.npy."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in PARTS:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Documents:
        """Map what `save` wrote into memory; all processes of a machine share the pages."""
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in PARTS))
