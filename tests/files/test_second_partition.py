"""Which sizes of hpZ's second partition suit which ranks and machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minilora.files.deepspeed_file import Facts, read_deepspeed_files, resolve_ds_config
from minilora.files.second_partition import KEY, second_partition
from minilora.settings.errors import RequestError
from minilora.settings.settings import TrainSettings
from tests.support.article import example_shape

SHAPE = example_shape("llama-3.1-8b")
# Ranks in all, and ranks of each machine.
ALONE, PAIR, EIGHTS = (4, 4), (4, 2), (16, 8)


def resolve(tmp_path: Path, zero: dict[str, Any], ranks: tuple[int, int | None]) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    facts = Facts(ranks[0], SHAPE, bf16=True, machine_ranks=ranks[1])
    return resolve_ds_config(path, TrainSettings(), facts)


@pytest.mark.parametrize(
    ("size", "ranks", "expected"),
    [
        (2, PAIR, 2),
        (2.0, PAIR, 2),
        ("auto", PAIR, 2),
        (4, EIGHTS, 4),  # GPUs of which four are linked among themselves
        ("auto", EIGHTS, 8),
        (2, ALONE, 2),
        (2, (4, None), 2),  # a launcher that does not say what a machine has
        ("auto", (4, None), 1),
        ("auto", ALONE, 1),  # it would hold every weight twice for nothing
        (4, ALONE, 1),
        (1, PAIR, 1),
        (0, PAIR, 1),
        ("auto", (2, 1), 1),
    ],
)
def test_sizes_that_suit(
    tmp_path: Path, size: Any, ranks: tuple[int, int | None], expected: int
) -> None:
    config = resolve(tmp_path, {"stage": 3, KEY: size}, ranks)
    assert second_partition(config) == expected
    assert (KEY in config["zero_optimization"]) == (expected > 1)


@pytest.mark.parametrize(
    ("size", "ranks", "words"),
    [
        (3, PAIR, ["is 3, and 4 ranks do not divide", '"auto"', "divisor of 2"]),
        (8, PAIR, ["is 8, and 4 ranks do not divide", "divisor of 2"]),
        (4, PAIR, ["is 4, and the 2 ranks of a machine do not divide", "another machine"]),
        (3, (6, 2), ["is 3, and the 2 ranks of a machine do not divide", "divisor of 2"]),
        ("auto", (3, 2), ['is "auto"', "this machine has 2, and 3 ranks", "as many ranks on each"]),
        ("2", PAIR, ['is "2"; a whole number']),
        (-2, PAIR, ["is -2; a whole number"]),
    ],
)
def test_sizes_that_do_not_suit_are_refused_by_name(
    tmp_path: Path, size: Any, ranks: tuple[int, int | None], words: list[str]
) -> None:
    with pytest.raises(RequestError) as refused:
        resolve(tmp_path, {"stage": 3, KEY: size}, ranks)
    (problem,) = refused.value.problems
    assert all(word in problem for word in [*words, "ds.json: zero_optimization." + KEY])


@pytest.mark.parametrize("size", [2, 3, "auto"])
def test_below_stage_3_it_means_nothing(tmp_path: Path, size: Any) -> None:
    assert resolve(tmp_path, {"stage": 2, KEY: size}, PAIR)["zero_optimization"] == {"stage": 2}


def test_the_shipped_file_is_advised_where_it_differs_from_zero3() -> None:
    def advised(name: str, ranks: int, machine_ranks: int | None) -> list[str]:
        facts = Facts(ranks, SHAPE, bf16=True, machine_ranks=machine_ranks)
        return [*read_deepspeed_files(TrainSettings(deepspeed=name), facts)]

    others = ["zero0", "zero2", "zero3_offload"]
    assert advised("zero3", 4, 2) == ["zero3", "zero0", "zero2", "zero3_nodes", "zero3_offload"]
    assert advised("zero3", 4, 4) == advised("zero3", 3, 2) == ["zero3", *others]
    assert advised("zero3_nodes", 4, None) == ["zero3_nodes", *others]
