"""python -m benchmarks.gpu: everything that wants a GPU, in one command and under ten minutes.

Needs one GPU and no network: weights are random, made on the device. What matters most comes
first, so that three minutes give parity of the fast paths, memory beside the plan under the cap of
a 24 GB card, and the speed beside the peer; then more of each, then 4 bits, last whether
torch.compile would pay. Each row is a JSON line as soon as it is there, and a short table ends it.
`--device cpu --size tiny` runs the same on a CPU. BENCHMARK_PATIENCE is how many seconds a silent
process may take; with BENCHMARK_FAKE=1 a single process does without NCCL.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import memory, report, speed
from benchmarks.parity import attention_parity, card, model_parity
from benchmarks.turns import ROOT, Player, Variant, settle
from benchmarks.workloads import SIZES, Size

Row = dict[str, Any]
PARTS = ("parity", "first", "memory", "speed", "four-bits", "leaves")
# How many rows of memory and how many variants of speed `first` has.
FIRST_CASES, FIRST_VARIANTS = 4, 3
# Seconds that a process of a part may take.
LIMITS = {"parity": 120.0, "memory": 150.0, "four-bits": 120.0, "leaves": 150.0}
# The order of the variants; those that are not named follow, if time is left.
ORDER = (
    "trainer",
    "minilora",
    "minilora-keep-0",
    "minilora-tile-2048",
    "minilora-1-of-7",
    "bare-recompute",
    "trainer-skewed",
    "minilora-skewed",
    "minilora-packed",
    "trainer-1-of-7",
)
# What needs more than a card of 80 GB; where it fits it is the fairer peer, and comes second.
NEEDS_MORE = "trainer-keep"


def cases(size: str, on_gpu: bool) -> list[memory.Case]:
    """The sweep of benchmarks.memory, the rows that the goals are about first.

    These are ZeRO-3 with the whole step in one span, then ZeRO-3, ZeRO-0 and ZeRO-2 in spans.
    """
    few = 1 if size == "8b" else 16
    base = memory.sweep(size, on_gpu)[0]
    near = dataclasses.replace(base, gather_tokens=8192 // few)
    goals = [base, near, *(dataclasses.replace(near, deepspeed=f"zero{stage}") for stage in (0, 2))]

    def place(case: memory.Case) -> int:
        usual = dataclasses.replace(case, deepspeed="zero3", batch=4, gather_tokens=None)
        if case in goals:
            return goals.index(case)
        return len(goals) + (case.system != "peer" and usual != base)

    return sorted(memory.sweep(size, on_gpu), key=place)


def variants(size: Size) -> list[tuple[str, Variant]]:
    """The variants of all groups of benchmarks.speed by importance, each once, with its group."""
    once: dict[str, tuple[str, Variant]] = {}
    for group, members in speed.groups(size, "cuda").items():
        for variant in members:
            once.setdefault(variant.name, (group, variant))
    return sorted(once.values(), key=lambda pair: (*ORDER, pair[1].name).index(pair[1].name))


class Run:
    """Rows that come in, until the time is over."""

    def __init__(self, own: argparse.Namespace) -> None:
        self.own, self.rows = own, list[Row]()
        self.deadline = time.monotonic() + 60 * own.minutes
        self.peers: dict[str, Player] = {}  # by workload, the first variant that computed it
        self.limit: float | None = None  # FLOP per second of a large matrix product

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.own.out:
            with self.own.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def child(self, part: str, *words: str) -> None:
        """A process of its own, whose JSON lines are rows. What it printed in time counts."""
        left = min(self.deadline - time.monotonic(), LIMITS[part])
        if left < min(5, LIMITS[part]):
            return
        command = [sys.executable, "-m", *words]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
            output, errors, failed = done.stdout, done.stderr, done.returncode != 0
        except subprocess.TimeoutExpired as late:
            output, errors = (_text(printed) for printed in (late.stdout, late.stderr))
            errors, failed = f"{errors}\nstill running after {left:.0f} s", True

        found = []
        for line in output.splitlines():
            if line.startswith("{"):
                with suppress(ValueError):  # the last line of a process that was ended
                    found.append(json.loads(line))
        if failed or not found:
            self.add({"part": part, "error": errors[-2000:], "command": command[2:]})
        for row in found:
            self.add({"part": part, **row})

    def device(self, size: str | None = None) -> tuple[str, ...]:
        """Where a process runs, and on which size."""
        return "--device", self.own.device, "--size", size or self.own.size

    def memory(self, part: str, found: Sequence[memory.Case], at_once: int = 1) -> None:
        """A process for each case. Alone, what it uses of the device is what the device has in use.

        at_once: so many share a GPU, each under the cap of a 24 GB card, and share its time.
        """
        words = ["benchmarks.memory", *self.device(), "--only", "0", "--cases"]
        changes = [json.dumps([dataclasses.asdict(case)]) for case in found]
        with ThreadPoolExecutor(at_once if self.own.device == "cuda" else 1) as pool:
            list(pool.map(partial(self.child, part, *words), changes))

    def speed(self, chosen: Sequence[tuple[str, Variant]]) -> None:
        """Each alone; the first one of a workload is whom its others are compared with."""
        if chosen and self.limit is None:
            self._play("", speed.MATMUL)
        for group, variant in chosen:
            if time.monotonic() > self.deadline - 40:
                return
            self._play(group, variant)

    def _play(self, group: str, variant: Variant) -> None:
        words = ["--device", self.own.device, "--size", self.own.size, "--timed", "2"]
        began, peer = time.monotonic(), self.peers.get(variant.workload)
        row: Row = {"group": group, "variant": variant.name}
        with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
            try:
                (played,) = speed.play([variant], peer, speed.read(words), Path(folder))
                if variant is speed.MATMUL:
                    self.limit = report.matmul_rate(played)
                    row["matmul_gflops"] = self.limit / 1e9
                else:
                    limit = self.limit or float("nan")
                    row = report.measure(played, limit, SIZES[self.own.size], group)
                    self.peers.setdefault(variant.workload, self._kept(played))
            except Exception as error:  # whatever it is, the rows of the others are wanted
                row["error"] = f"{type(error).__name__}: {error}"[-2000:]
        self.add({"part": "speed", "took": time.monotonic() - began, **row})

    def _kept(self, player: Player) -> Player:
        """The player, its gradients in a file that stays: others are compared with them."""
        path = Path(tempfile.mkdtemp(prefix="gpu-peer-"), "gradients.pt")
        path.write_bytes(Path(player.news[0]["gradients"]).read_bytes())
        player.news[0]["gradients"] = str(path)
        return player

    def table(self) -> Iterator[str]:
        for row in self.rows:
            if row["part"] == "parity" and "what" in row:
                yield f"{'ok ' if row['ok'] else 'BAD'} {row['error']:.1e} {row['what']}"
        found = [row for row in self.rows if "measured" in row]
        if found:
            yield from memory.shown(found)
        for row in self.rows:
            if "step_seconds" in row:
                yield (
                    f"{row['group']} {row['variant']}: "
                    f"{row['tokens_per_second']['median']:,.0f} tokens/s, "
                    f"{row['step_seconds']['median']:.2f} s a step, {row['share_of_matmul']:.0%} "
                    f"of {row['matmul_gflops'] / 1e3:,.4g} TFLOP/s"
                )
        if wrong := sum("error" in row and "ok" not in row for row in self.rows):
            yield f"{wrong} rows failed: see their lines"


def _text(printed: bytes | str | None) -> str:
    """What a process printed before it was ended: bytes, whatever was asked for."""
    return printed.decode(errors="replace") if isinstance(printed, bytes) else printed or ""


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="8b", choices=tuple(SIZES))
    parser.add_argument("--minutes", type=float, default=9, help="start nothing after these")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--cases", type=int, help="only so many rows of memory")
    parser.add_argument("--only", nargs="*", help="names of the variants whose speed is wanted")
    parser.add_argument("--parity", action="store_true", help="that part alone, in this process")
    parser.add_argument("--out", type=Path, help="append the JSON lines here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 1 if a row failed or a parity is bad."""
    own = read(argv)
    settle(own.device)
    if own.parity:
        parts: list[Callable[[], Iterator[Row]]] = [
            lambda: attention_parity(own.device),
            lambda: model_parity(SIZES[own.size], own.device),
            lambda: card(own.device),
        ]
        for part in parts:
            for row in part():
                print(json.dumps(row), flush=True)
        return 0

    run = Run(own)
    run.add({"part": "versions", **report.versions()})
    play(run, own.parts)
    print(*run.table(), sep="\n")
    return int(any("error" in row and not row.get("ok") for row in run.rows))


def play(run: Run, parts: Sequence[str]) -> None:
    """The parts in the order of what they are worth."""
    own, on_gpu = run.own, run.own.device == "cuda"
    found = cases(own.size, on_gpu)[: own.cases]
    wanted = [
        pair for pair in variants(SIZES[own.size]) if not own.only or pair[1].name in own.only
    ]
    chosen = [pair for pair in wanted if pair[1].bits is None]

    if "parity" in parts:
        run.child("parity", "benchmarks.gpu", "--parity", *run.device())
    if max((row.get("total", 0) for row in run.rows), default=0) > 100e9:
        chosen.sort(key=lambda pair: (pair[1].name != "trainer", pair[1].name != NEEDS_MORE))
    if "first" in parts:
        run.memory("memory", found[:FIRST_CASES])
        run.speed(chosen[:FIRST_VARIANTS])
    if "memory" in parts:
        run.memory("memory", found[FIRST_CASES : FIRST_CASES + 6], at_once=3)
    if "speed" in parts:
        run.speed(chosen[FIRST_VARIANTS if "first" in parts else 0 : len(ORDER)])
    if "four-bits" in parts:
        # The rows of the tiny model cannot be cut into blocks of 64 weights.
        tiny = own.size == "tiny"
        run.child("four-bits", "benchmarks.unpacking", *run.device("mid" if tiny else own.size))
        run.memory("four-bits", [] if tiny else memory.packed(own.size, on_gpu)[: own.cases])
        run.speed([pair for pair in wanted if pair[1].bits])
    if "leaves" in parts and on_gpu:  # on a CPU it would need a compiler
        run.child("leaves", "benchmarks.leaves", *run.device())
    if "memory" in parts:
        run.memory("memory", found[FIRST_CASES + 6 :], at_once=3)
    if "speed" in parts:
        run.speed(chosen[len(ORDER) :])


if __name__ == "__main__":
    sys.exit(main())
