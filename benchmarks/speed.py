"""python -m benchmarks.speed: minilora beside transformers + PEFT, on the same weights and rows.

--device cpu --size tiny|mid gives ratios on any machine; --device cuda --size 8b needs one GPU.
Every variant runs in processes of its own; they take turns step by step. Before any timing, losses
and LoRA gradients of the first step must agree.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import WARM_UP, matmul_rate, measure, summary, versions
from benchmarks.turns import Player, Variant, settle, start
from benchmarks.workloads import SIZES, Size

MATMUL = Variant("matmul", "matmul")


def groups(size: Size, device: str) -> dict[str, list[Variant]]:
    """Variants that are compared with each other; the first of a group is its peer.

    The first of minilora's is what a user gets without a word about memory: as many blocks keep
    their activations as fit.
    """
    trainer, ours = Variant("trainer", "trainer"), Variant("minilora", "minilora")
    bare = Variant("bare", "bare", recompute=False)
    micro = size.per_device * size.equal
    gather = {"gather_tokens": micro, "tile_tokens": None if device == "cuda" else min(micro, 2048)}
    share = [replace(ours, name=f"minilora-keep-{k:g}", keep=k) for k in (0, 0.25, 0.5, 0.75, 1)]
    few_rows, many_rows = (n * size.equal for n in (1, 4))
    tiles = [
        replace(ours, name=f"minilora-tile-{n}", tile_tokens=n, keep=0.0)
        for n in ((2048, 4096, 16384) if device == "cuda" else (few_rows, many_rows))
    ]
    seven = {"ranks": 1, "simulated": 7, "stage": 3}
    simulated = [
        replace(trainer, name="trainer-1-of-7", **seven),
        replace(ours, name="minilora-1-of-7", **seven),
        replace(ours, name="minilora-1-of-7-recompute", keep=0.0, **seven),
        replace(ours, name="minilora-1-of-7-gather", **seven, **gather),
        replace(ours, name="minilora-1-of-7-zero2", **{**seven, "stage": 2}),
        replace(ours, name="minilora-1-of-7-zero0", **{**seven, "stage": 0}),
    ]
    skewed = {"workload": "skewed"}
    if device == "cuda":  # real ranks need a GPU each
        return {
            "single": [
                trainer,
                ours,
                share[0],
                replace(trainer, name="trainer-keep", recompute=False),
                replace(bare, name="bare-recompute", recompute=True),
                bare,
            ],
            "skewed": [
                replace(trainer, name="trainer-skewed", **skewed),
                replace(ours, name="minilora-skewed", **skewed),
                replace(ours, name="minilora-packed", packing=True, **skewed),
            ],
            "one-of-7": simulated,
            # These are compared with each other: no peer.
            "keep": [replace(way, name=f"{way.name}-gather", **gather) for way in share],
            "tiles": [share[0], *tiles],
            "four-bits": [ours, replace(ours, name="minilora-four-bits", bits=4)],
        }
    zero3 = {"stage": 3, "ranks": 2}
    trainer, ours = replace(trainer, name="trainer-zero3", **zero3), replace(ours, **zero3)
    alone = Variant("minilora", "minilora")
    return {
        "zero3": [
            trainer,
            replace(ours, name="minilora-zero3"),
            replace(trainer, name="trainer-zero3-keep", recompute=False),
            replace(ours, name="minilora-zero3-recompute", keep=0.0),
            replace(ours, name="minilora-zero3-half", keep=0.5),
            replace(ours, name="minilora-zero3-their-file", file="llama_factory"),
            replace(ours, name="minilora-zero3-gather", **gather),
            replace(ours, name="minilora-zero2", stage=2),
            replace(ours, name="minilora-zero0", stage=0),
        ],
        "skewed": [
            replace(trainer, name="trainer-zero3-skewed", **skewed),
            replace(ours, name="minilora-zero3-skewed", **skewed),
            replace(ours, name="minilora-zero3-recompute-skewed", keep=0.0, **skewed),
            replace(ours, name="minilora-zero3-packed", packing=True, **skewed),
        ],
        "four-bits": [
            replace(trainer, name="trainer-zero3-bitsandbytes", bits=4),
            replace(ours, name="minilora-zero3-four-bits", bits=4),
            replace(ours, name="minilora-zero3-four-bits-recompute", bits=4, keep=0.0),
            replace(ours, name="minilora-zero3-recompute", keep=0.0),
            replace(ours, name="minilora-zero0-four-bits", bits=4, stage=0),
        ],
        "single": [
            replace(bare, name="bare-recompute", recompute=True),
            bare,
            alone,
            share[0],
            *tiles,
        ],
        "one-of-7": simulated,
    }


def compare(player: Player, reference: Player) -> str:
    """Loss and LoRA gradients of the first step beside the peer's.

    Raises RuntimeError where they differ by more than rounding: in bf16, 32 blocks deep, that is
    0.08 of a gradient's norm between two that are right, each 0.06 to 0.08 from fp32.
    """
    mine, theirs = player.news[0], reference.news[0]
    found, expected = (torch.load(news["gradients"]) for news in (mine, theirs))
    if found.keys() != expected.keys() or not expected:
        raise RuntimeError(f"{player.variant.name}: other parameters are trained")
    exact = next(iter(expected.values())).dtype == torch.float32 and not torch.cuda.is_available()
    worst = max(
        float((found[name].float() - grad.float()).norm() / grad.float().norm())
        for name, grad in expected.items()
    )
    apart = abs(mine["loss"] - theirs["loss"]) / theirs["loss"]
    text = f"{player.variant.name}: loss {mine['loss']:.6f} ({apart:.1e}), gradients {worst:.1e}"
    if not (apart < (1e-5 if exact else 1e-2) and worst < (1e-4 if exact else 0.2)):
        raise RuntimeError(f"{text}: not those of {reference.variant.name}")
    return text


def play(
    variants: Sequence[Variant], peer: Player | None, options: argparse.Namespace, folder: Path
) -> list[Player]:
    """Start all, compare all with the peer (None: the first of them), let them step in turns."""
    players: list[Player] = []
    try:
        for variant in variants:
            players.append(start(variant, options.size, options.device, options.steps, folder))
            players[-1].hear()
            say(f"  {variant.name} has done its first step")
        for player in players:
            variant, reference = player.variant, peer or players[0]
            if variant is MATMUL or variant.packing or variant.simulated:
                continue
            if variant.bits == reference.variant.bits:
                say("  " + compare(player, reference))
        for _ in range(options.steps - 1):
            for player in players:
                player.step()
    finally:
        for player in players:
            player.stop(finished=len(player.news) == options.steps)
    return players


def measured(
    group: str, variants: Sequence[Variant], options: argparse.Namespace, folder: Path
) -> Iterator[dict[str, Any]]:
    """A line per variant. On a GPU each has the memory to itself, and may fail alone."""
    size, peer, limit = SIZES[options.size], None, 0.0
    together = [[*variants, MATMUL]]
    for alike in together if options.device == "cpu" else [[MATMUL], *([v] for v in variants)]:
        try:
            players = play(alike, peer, options, folder)
        except RuntimeError as error:
            if options.device == "cpu" or peer is None:
                raise
            say(str(error))
            yield {"group": group, "variant": alike[0].name, "failed": str(error)[-300:]}
            continue
        if players[-1].variant is MATMUL:
            limit = matmul_rate(players.pop())
        for player in players:
            peer = peer or player
            yield measure(player, limit, size, group)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument(
        "--groups",
        nargs="*",
        help="zero3, skewed, single, one-of-7, keep, tiles, four-bits (needs bitsandbytes); "
        "default all but the last",
    )
    parser.add_argument("--timed", type=int, default=6, help="steps after the warm-up")
    parser.add_argument("--only", nargs="*", help="names of what is compared with the first")
    parser.add_argument("--out", type=Path, help="folder for speed-DEVICE-SIZE-GROUPS.json and .md")
    options = parser.parse_args(argv)
    options.steps = WARM_UP + options.timed
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = read(argv)
    settle(options.device)
    chosen, began = groups(SIZES[options.size], options.device), time.monotonic()
    lines = [{**versions(), "command": sys.argv[1:], "device": options.device}]
    parts = ["speed", options.device, options.size, *(options.groups or ())]
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    for name in options.groups or (group for group in chosen if group != "four-bits"):
        say(f"{name}:")
        peer, *others = chosen[name]
        wanted = [peer, *(v for v in others if not options.only or v.name in options.only)]
        with tempfile.TemporaryDirectory(prefix="speed-") as folder:
            for line in measured(name, wanted, options, Path(folder)):
                print(json.dumps(line), flush=True)
                lines.append(line)
                lines[0]["minutes"] = (time.monotonic() - began) / 60
                if options.out:
                    write(lines, options.out / "-".join(parts))
    print(json.dumps(lines[0]), summary(lines), sep="\n")


def write(lines: Sequence[dict[str, Any]], stem: Path) -> None:
    """All that is known so far: a run that is cut short leaves its numbers."""
    stem.with_suffix(".json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stem.with_suffix(".md").write_text(summary(lines))


if __name__ == "__main__":
    main()
