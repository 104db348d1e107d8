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

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]
Encoded = tuple[
    Int32s, Bools
]  # of one document: its tokens, and whether each is trained, both (N,)

ARRAYS = ("tokens", "trained", "offsets")  # the fields of Documents, each saved as one file


@dataclass(frozen=True)
class Documents:
    """All tokenised documents, end to end.

    tokens: (T,) int32. trained: (T,) bool, whether the token is a target of the loss.
    offsets: (n+1,) int64, where each document starts, and at the end T.
    """

    tokens: Int32s
    trained: Bools
    offsets: Int64s

    @classmethod
    def of(cls, encoded: Sequence[Encoded]) -> Documents:
        """Lay documents end to end."""
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(tokens) for tokens, _ in encoded], out=offsets[1:])

        # The empty array in front is there because numpy cannot concatenate an empty list.
        tokens = np.concatenate([np.empty(0, np.int32), *(tokens for tokens, _ in encoded)])
        trained = np.concatenate([np.empty(0, np.bool_), *(trained for _, trained in encoded)])
        return cls(tokens.astype(np.int32, copy=False), trained, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Encoded:
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
        """Targets per document: (n,) int64.

        The first token of a document is not counted, for no token stands before it to predict it.
        """
        # reduceat sums from each start to the next one. That is the document's own sum only where
        # the document is not empty, and none is: chat.py leaves out what has no target.
        starts = self.offsets[:-1]
        return np.add.reduceat(self.trained, starts, dtype=np.int64) - self.trained[starts]

    def fingerprint(self) -> str:
        """A digest of every token, mask and boundary: a resumed run sees whether data changed."""
        digest = hashlib.sha256()
        for name in ARRAYS:
            digest.update(np.ascontiguousarray(getattr(self, name)).data)
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write tokens.npy, trained.npy and offsets.npy into `folder`, which is made if needed."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Documents:
        """Map what `save` wrote into memory; all processes of a machine share the pages."""
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS))
