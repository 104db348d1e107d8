"""Lines of the plan: their numbers, and how these are written."""

from __future__ import annotations

from minilora.memory.terms import Tensor, Term


def test_a_line_of_tensors_is_their_sum() -> None:
    tensors = [Tensor("gate", 100, 7), Tensor("cos and sin", 100, 3, "rope.py rotation", times=2)]
    term = Term.of("working set", tensors, 4)
    assert (term.part, term.count, term.bytes) == ("activations", 1300, 5200)
    assert [tensor.origin for tensor in term.tensors] == [
        "100 tokens x 7", "2 x 100 tokens x 3"
    ]  # fmt: skip


def test_a_formula_says_where_the_number_comes_from() -> None:
    assert Term("parameters", "weights", 2000, 2, "14,000 / 7").formula == "14,000 / 7 x 2 B"
    assert Term("parameters", "weights", 2000, 2).formula == "2,000 x 2 B"
