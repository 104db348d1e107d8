"""The second partition of ZeRO++ (hpZ): which sizes suit the ranks, and what "auto" means.

At stage 3 each weight is split over all ranks, so that gathers cross from machine to machine. With
`zero_hpz_partition_size: N` every N neighbouring ranks hold all weights once more, split among
them, and gather from there: the ranks of one machine, where the network is fast. DeepSpeed itself
only asserts that the ranks divide by N, and ignores the key below stage 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEY = "zero_hpz_partition_size"


def second_partition(config: Mapping[str, Any]) -> int:
    """How many ranks share a second partition, by a resolved file; 1 where there is none."""
    return int(config.get("zero_optimization", {}).get(KEY, 1))


def fit_second_partition(zero: dict[str, Any], ranks: int, machine_ranks: int | None) -> list[str]:
    """Put the number in place of "auto", and leave the key out where it would save nothing.

    zero: the section zero_optimization, which is changed. machine_ranks: how many of the ranks are
    on this machine, None if nobody says it: then all are taken to be on one. Returns a line for
    what does not fit. HF's Trainer knows no "auto" here, so its meaning is minilora's own.
    """
    size = zero.pop(KEY, 1)
    if zero.get("stage") != 3:
        return []

    within = machine_ranks or ranks
    remedy = f'write "auto", the ranks of one machine, or another divisor of {within}'
    problem = ""
    if size == "auto":
        size = within
        if ranks % size:
            problem = (
                f'is "auto", the ranks of one machine: this machine has {size}, and {ranks} ranks '
                "in all are not machines of that size; start as many ranks on each, or remove it"
            )
    elif size > 1 and ranks % size:
        problem = f"is {size}, and {ranks} ranks do not divide by it; {remedy}"
    elif size > 1 and within % size:
        problem = (
            f"is {size}, and the {within} ranks of a machine do not divide by it, so that weights "
            f"would be gathered from another machine; {remedy}"
        )

    # One group of all ranks would hold each weight twice for nothing.
    if 1 < size < ranks:
        zero[KEY] = int(size)
    return [f"zero_optimization.{KEY} {problem}"] if problem else []
