"""Documents end to end: on disk, and in numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minilora.data.documents import Documents
from tests.support.prepared import some_documents


def test_documents_survive_a_round_trip_and_their_fingerprint_sees_every_change(
    tmp_path: Path,
) -> None:
    documents = some_documents(9, seed=0)
    documents.save(tmp_path / "cache")
    again = Documents.load(tmp_path / "cache")
    assert isinstance(again.tokens, np.memmap)
    for name, dtype in (("tokens", np.int32), ("trained", np.bool_), ("offsets", np.int64)):
        assert getattr(again, name).dtype == dtype
        np.testing.assert_array_equal(getattr(again, name), getattr(documents, name))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "offsets.npy",
        "tokens.npy",
        "trained.npy",
    ]
    assert again.fingerprint() == documents.fingerprint()
    for name in ("tokens", "trained", "offsets"):
        fields = {key: getattr(documents, key).copy() for key in ("tokens", "trained", "offsets")}
        fields[name][1] = 1 - fields[name][1]
        assert Documents(**fields).fingerprint() != documents.fingerprint()


def test_labelled_counts_targets_but_never_the_first_token() -> None:
    documents = some_documents(40, seed=1)
    expected = [
        int(documents.trained[start + 1 : end].sum())
        for start, end in zip(documents.offsets[:-1], documents.offsets[1:], strict=True)
    ]
    assert documents.trained[documents.offsets[:-1]].any()  # else the case is not tried
    assert documents.labelled.tolist() == expected
    assert documents.lengths.tolist() == np.diff(documents.offsets).tolist()
