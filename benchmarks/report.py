"""From the news of all steps to lines of numbers and a table of ratios."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any

import numpy as np

from benchmarks.turns import ROOT, Player
from benchmarks.workloads import Row, Size, micro_batches, padded, rows

WARM_UP = 3  # steps whose times are not used: the one that is compared, and two more
LINKS = (5, 10, 24)  # GB/s: PCIe through the host, better, and with peer-to-peer


def versions() -> dict[str, Any]:
    """What the numbers depend on; None of what is not there."""
    found: dict[str, str | None] = {"commit": None}
    for name in ("torch", "deepspeed", "transformers", "peft", "accelerate", "bitsandbytes"):
        found[name] = None
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    with suppress(OSError):  # a machine without git
        asked = ["git", "rev-parse", "--short", "HEAD"]
        done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
        found["commit"] = done.stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        **found,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }


def matmul_rate(matmul: Player) -> float:
    """FLOP per second of a large matrix product: the limit that the variants are held against."""
    return float(np.median([news["bytes"] / news["seconds"] for news in matmul.news[WARM_UP:]]))


def measure(player: Player, limit: float, size: Size, group: str) -> dict[str, Any]:
    """The numbers of one variant: of its timed steps the median and the 10th and 90th percentile.

    Tokens are those of all ranks; FLOPs those of the model, without recomputing or padding. Of
    what ZeRO-3 gathers a rank receives all parts but its own.
    """
    variant, timed = player.variant, player.news[WARM_UP:]
    seconds = [news["seconds"] for news in timed]
    steps = [_work(player, size, index) for index in range(WARM_UP, len(player.news))]
    rates = [step["tokens"] / each for step, each in zip(steps, seconds, strict=True)]
    shared = variant.world // variant.ranks  # of a simulated world only one rank computes
    speed = np.median(
        [step["flops"] / shared / each for step, each in zip(steps, seconds, strict=True)]
    )
    last = timed[-1]
    received = last["bytes"] * (variant.world - 1) / variant.world
    return {
        "group": group,
        "variant": variant.name,
        "step_seconds": _spread(seconds),
        "tokens_per_second": _spread(rates),
        "padded_tokens_per_second": float(
            np.median([s["padded"] / t for s, t in zip(steps, seconds, strict=True)])
        ),
        "model_gflops": float(speed) / 1e9,
        "matmul_gflops": limit / 1e9,
        "share_of_matmul": float(speed / limit / variant.ranks),
        "gathered_bytes": last["bytes"],
        "gather_calls": last["calls"],
        "received_seconds": {str(link): received / link / 1e9 for link in LINKS},
        "memory_gib": {k: last[k] / 2**30 for k in ("rss", "allocated", "reserved") if k in last},
        "start": {**player.news[0]["marks"], "first step": player.news[0]["seconds"]},
        "kept_blocks": last.get("kept"),
        "held_bytes": last.get("held"),
        "loss": [player.news[0]["loss"], last["loss"]],
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.percentile(values, (10, 50, 90))
    return {"median": float(middle), "p10": float(low), "p90": float(high)}


def _work(player: Player, size: Size, step: int) -> dict[str, float]:
    """Tokens, with and without padding, and FLOPs of one step of all ranks."""
    variant = player.variant
    if variant.packing:
        tokens = float(player.news[step]["tokens"])
        return {"tokens": tokens, "padded": tokens, "flops": tokens * size.model_flops(1)}
    per_step = size.per_device * size.accumulation * variant.world
    made: list[Row] = rows(size, variant.workload, per_step * (step + 1))[-per_step:]
    lengths = [len(ids) for ids, _ in made]
    tokens = float(sum(lengths))
    computed = tokens
    if variant.system != "minilora":
        computed = sum(padded(batch)["input_ids"].numel() for batch in micro_batches(size, made))
    flops = sum(map(size.model_flops, lengths))
    return {"tokens": tokens, "padded": float(computed), "flops": flops}


def summary(lines: Sequence[dict[str, Any]]) -> str:
    """Tables in Markdown: for each group its variants, with ratios to the first of the group."""
    head = lines[0]
    facts = ", ".join(f"{key} {value}" for key, value in head.items() if key != "command")
    text = [f"`python -m benchmarks.speed {' '.join(head['command'])}`: {facts}", ""]
    for group in dict.fromkeys(line["group"] for line in lines[1:]):
        members = [line for line in lines[1:] if line["group"] == group]
        text += [f"## {group}", "", _row(*HEADERS), _row(*["---"] * len(HEADERS))]
        text += [_row(*_cells(line, members)) for line in members]
        text.append("")
    return "\n".join(text)


HEADERS = (
    "variant", "x peer", "step s (p10, p90)", "tokens/s", "with padding", "model GFLOP/s",
    "of matmul", "kept blocks", "gathered MB", "calls", "s at 5/10/24 GB/s", "GiB", "held MB",
    "start s",
)  # fmt: skip


def _cells(line: dict[str, Any], members: Sequence[dict[str, Any]]) -> list[str]:
    if "failed" in line:
        return [line["variant"], "failed", *[""] * (len(HEADERS) - 2)]
    rate, step = line["tokens_per_second"]["median"], line["step_seconds"]
    memory = line["memory_gib"]
    return [
        line["variant"],
        f"{rate / members[0]['tokens_per_second']['median']:.2f}",
        f"{step['median']:.3f} ({step['p10']:.3f}, {step['p90']:.3f})",
        f"{rate:,.0f}",
        f"{line['padded_tokens_per_second']:,.0f}",
        f"{line['model_gflops']:.1f}",
        f"{line['share_of_matmul']:.0%}",
        str("" if line["kept_blocks"] is None else line["kept_blocks"]),
        f"{line['gathered_bytes'] / 1e6:.1f}",
        str(line["gather_calls"]),
        "/".join(f"{seconds:.3g}" for seconds in line["received_seconds"].values()),
        f"{memory.get('allocated', memory['rss']):.2f}",
        f"{line['held_bytes'] / 1e6:.1f}" if line.get("held_bytes") else "",
        f"{line['start']['first step']:.1f}",
    ]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
