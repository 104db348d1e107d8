"""What a rank receives from others in an optimizer step: within its machine, and between machines.

What all ranks send each other crosses from machine to machine where there are several. What the
ranks of a second partition (hpZ) send each other does not. NCCL passes both round a ring of ranks,
so that each rank receives all parts but its own, n - 1 of n. One link of the ring leads into each
machine, and so as many bytes come over the network into a machine as into each of its GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from minilora.memory.job import MemoryJob
from minilora.memory.peak import peak_memory


@dataclass(frozen=True)
class Links:
    """Gbit/s into each GPU from the others of its machine, and into a machine from the others."""

    within: float = 80
    between: float = 10


class Traffic(NamedTuple):
    """Bytes of an optimizer step, each rank's own part among them.

    in_groups: weights gathered among the ranks of a second partition; among_all: weights gathered
    among all ranks; exchanged: gradients and new weights, which all ranks exchange too.
    """

    in_groups: int
    among_all: int
    exchanged: int


class Received(NamedTuple):
    """Bytes that a rank receives in a step from its own machine, and from other machines."""

    within: float
    between: float


def traffic(job: MemoryJob) -> Traffic:
    """Any step but the first, which gathers the second partition's weights among all ranks.

    Once a step DeepSpeed gathers what it keeps whole, since new values may be among it, and what
    is trained and split (`_post_step` and `invalidate_secondary_tensor` of stage3.py).
    """
    exchanged = exchanged_bytes(job) * sum(_trained(job))
    if job.zero.stage < 3 or job.ranks == 1:
        return Traffic(0, 0, exchanged)

    gathered, threshold = peak_memory(job).gathered, job.zero.stage3_param_persistence_threshold
    frozen = [n for name, n in job.shape.held(job.size).items() if name not in job.whole]
    kept_whole = sum(
        _padded([parameter.elements], job) * parameter.itemsize
        for parameter in frozen
        if parameter.elements <= threshold
    )
    kept_whole += job.size * _padded((n for n in _trained(job) if n <= threshold), job)
    if job.zero.zero_hpz_partition_size == 1:
        return Traffic(0, gathered + kept_whole, exchanged)
    stale = job.size * _padded((n for n in _trained(job) if n > threshold), job)
    return Traffic(gathered - stale, kept_whole + stale, exchanged)


def received(job: MemoryJob) -> Received:
    """What comes from the rank's own machine, and what from others."""
    step, group = traffic(job), job.zero.zero_hpz_partition_size
    from_group = step.in_groups * (group - 1) / group
    from_all = (step.among_all + step.exchanged) * (job.ranks - 1) / job.ranks
    if job.machines == 1:
        return Received(from_group + from_all, 0)
    return Received(from_group, from_all)


def seconds(job: MemoryJob, links: Links) -> tuple[float, float]:
    """How long the links within a machine, and those between machines, need for a step.

    A ring that crosses machines is as slow as its slowest link.
    """
    step = received(job)
    slowest = min(links.within, links.between)
    return step.within * 8e-9 / links.within, step.between * 8e-9 / slowest


def waited_for(job: MemoryJob, links: Links) -> float:
    """Seconds of gathering, and whole seconds of what is exchanged.

    Less than a second of gradients is nothing beside blocks that are not computed again.
    """
    step, ranks, group = traffic(job), job.ranks, job.zero.zero_hpz_partition_size
    all_ranks = links.within if job.machines == 1 else min(links.within, links.between)
    per_byte = 8e-9 * (ranks - 1) / ranks / all_ranks
    in_groups = 8e-9 * step.in_groups * (group - 1) / group / links.within
    return in_groups + step.among_all * per_byte + int(step.exchanged * per_byte)


def exchanged_bytes(job: MemoryJob) -> int:
    """Bytes per trained weight that a rank sends in a step, for gradients and new weights.

    At stages 0 and 1 the ranks exchange gradients once a step, at stages 2 and 3 after each span.
    An all-reduce sends them twice: once to be summed, once as sums. At stages 1 and 2 each rank
    hands out the weights that it has updated.
    """
    if job.zero.stage == 0:
        return 2 * 4  # in fp32
    gradients = 2 if job.zero.stage == 1 else job.spans
    return job.size * (gradients + (job.zero.stage < 3))


def _trained(job: MemoryJob) -> list[int]:
    """Elements of each trained tensor."""
    return [*job.lora.values()] * job.shape.num_layers + [*job.whole.values()]


def _padded(sizes: Iterable[int], job: MemoryJob) -> int:
    """Elements of tensors that are cut into as many equal parts as there are ranks."""
    return sum(job.ranks * -(-size // job.ranks) for size in sizes)
