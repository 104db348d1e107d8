"""python -m benchmarks.speed: minilora beside transformers + PEFT, on the same weights and rows.

--device cpu --size tiny|mid gives ratios on any machine; --device cuda --size 8b needs one GPU.
Every variant runs in processes of its own; they take turns step by step. Before any timing, losses
and LoRA gradients of the first step must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.report import WARM_UP, measure, summary, versions
from benchmarks.turns import Player, Variant, start
from benchmarks.workloads import SIZES, Size


def groups(size: Size, device: str) -> dict[str, list[Variant]]:
    """Variants that are compared with each other; the first of a group is its peer."""
    row = size.equal
    zero3 = {"stage": 3, "ranks": 2}
    trainer = Variant("trainer-zero3", "trainer", **zero3)
    ours = Variant("minilora-zero3", "minilora", **zero3)
    alone = Variant("minilora", "minilora")
    single = [
        Variant("bare-recompute", "bare"),
        Variant("bare", "bare", recompute=False),
        alone,
        replace(alone, name="minilora-keep", recompute=False),
        *(
            replace(alone, name=f"minilora-tile-{rows}-rows", tile_tokens=rows * row)
            for rows in (1, 4)
        ),
    ]
    micro = size.per_device * row
    gather = {"gather_tokens": micro, "tile_tokens": min(micro, 2048)}
    simulated = [
        replace(trainer, name="trainer-1-of-7", ranks=1, simulated=7),
        replace(ours, name="minilora-1-of-7", ranks=1, simulated=7),
        replace(ours, name="minilora-1-of-7-gather", ranks=1, simulated=7, **gather),
    ]
    if device == "cuda":  # real ranks need a GPU each
        return {"single": [Variant("trainer", "trainer"), *single], "one-of-7": simulated}
    return {
        "zero3": [
            trainer,
            ours,
            replace(trainer, name="trainer-zero3-keep", recompute=False),
            replace(ours, name="minilora-zero3-keep", recompute=False),
            replace(ours, name="minilora-zero3-their-file", file="llama_factory"),
            replace(ours, name="minilora-zero3-gather", **gather),
            replace(ours, name="minilora-zero2", stage=2),
            replace(ours, name="minilora-zero0", stage=0),
        ],
        "skewed": [
            replace(trainer, name="trainer-zero3-skewed", workload="skewed"),
            replace(ours, name="minilora-zero3-skewed", workload="skewed"),
            replace(ours, name="minilora-zero3-keep-skewed", workload="skewed", recompute=False),
            replace(ours, name="minilora-zero3-packed", workload="skewed", packing=True),
        ],
        "single": single,
        "one-of-7": simulated,
    }


def compare(player: Player, reference: Player) -> str:
    """Loss and LoRA gradients of the first step beside the peer's.

    Raises RuntimeError where they differ by more than rounding.
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
    if not (apart < (1e-5 if exact else 1e-2) and worst < (1e-4 if exact else 5e-2)):
        raise RuntimeError(f"{text}: not those of {reference.variant.name}")
    return text


def play(
    variants: Sequence[Variant], peer: Player | None, options: argparse.Namespace, folder: Path
) -> list[Player]:
    """Start all, compare all with the peer (None: the first of them), let them step in turns."""
    players: list[Player] = []
    try:
        for variant in [*variants, Variant("matmul", "matmul")]:
            players.append(start(variant, options.size, options.device, options.steps, folder))
            players[-1].hear()
            say(f"  {variant.name} has done its first step")
        for player in players[:-1]:
            same_rows = not (player.variant.packing or player.variant.simulated)
            if same_rows:
                say("  " + compare(player, peer or players[0]))
        for _ in range(options.steps - 1):
            for player in players:
                player.step()
    finally:
        for player in players:
            player.stop(finished=len(player.news) == options.steps)
    return players


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--groups", nargs="*", help="zero3, skewed, single, one-of-7; default all")
    parser.add_argument("--timed", type=int, default=6, help="steps after the warm-up")
    parser.add_argument("--out", type=Path, help="folder for speed-DEVICE-SIZE-GROUPS.json and .md")
    options = parser.parse_args(argv)
    options.steps = WARM_UP + options.timed
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = read(argv)
    if options.device == "cpu":
        # One thread per process, and no AMX, which some virtual machines announce and lack.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    size, began = SIZES[options.size], time.monotonic()
    chosen = groups(size, options.device)
    lines = [{**versions(), "command": sys.argv[1:], "device": options.device}]
    for name in options.groups or chosen:
        say(f"{name}:")
        with tempfile.TemporaryDirectory(prefix="speed-") as folder:
            # On a GPU each has the memory to itself: no turns.
            sets = [chosen[name]] if options.device == "cpu" else [[v] for v in chosen[name]]
            peer = None
            for variants in sets:
                played = play(variants, peer, options, Path(folder))
                peer = peer or played[0]
                found = [measure(player, played[-1], size, name) for player in played[:-1]]
                print(*map(json.dumps, found), sep="\n", flush=True)
                lines += found
    lines[0]["minutes"] = (time.monotonic() - began) / 60
    table = summary(lines)
    print(json.dumps(lines[0]), table, sep="\n")
    if options.out:
        parts = ["speed", options.device, options.size, *(options.groups or ())]
        stem = options.out / "-".join(parts)
        stem.with_suffix(".json").write_text("".join(json.dumps(line) + "\n" for line in lines))
        stem.with_suffix(".md").write_text(table)


if __name__ == "__main__":
    main()
