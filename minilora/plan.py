"""Will it fit? `python -m minilora.plan CONFIG --num_gpus 7 --gpu_memory 24` says it beforehand.

It needs the config.json of the base model alone: no weights, no GPU, no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from minilora.files.deepspeed_file import Facts, read_deepspeed_files
from minilora.files.model_config import ModelConfig, read_model_config
from minilora.memory.job import MemoryJob
from minilora.memory.peak import GIB, Budget
from minilora.memory.ways import (
    MARGIN,
    TILES,
    Way,
    asked_way,
    keep_most_blocks,
    longest_document,
    nearest_that_fit,
    recommended,
    ways,
)
from minilora.memory.zero3_gathers import Zero
from minilora.model.lora_shape import LoraShape
from minilora.report.curves import drawing, new_figure
from minilora.settings.command_line import read_options
from minilora.settings.errors import RequestError, exit_code
from minilora.settings.settings import Settings
from minilora.settings.terminal import Lasting
from minilora.training.advice import Amounts, advice

# A card sold with 24 GB has 24 x 2^30 bytes, of which the driver keeps a part: torch reports
# 23.64 GiB for an RTX 4090, and 79.1 GiB for an H100 of 80 GB.
USABLE = 0.985
COLOURS = {
    "parameters": "#4c78a8",
    "accumulation": "#b279a2",
    "optimizer states": "#54a24b",
    "activations": "#f58518",
    "fixed": "#9d9d9d",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 it fits, 1 it does not, 2 the request is wrong."""
    return exit_code(lambda: _run(*read_options(_parser(), argv, "plan")))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m minilora.plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--num_gpus", type=int, default=1)
    parser.add_argument("--gpu_memory", type=float, default=24, help="GB, as the card is sold")
    parser.add_argument("--link_gbps", type=float, default=80, help="Gbit/s into each GPU")
    parser.add_argument("--explain", action="store_true", help="how each number comes about")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the ways that are compared")
    return parser


def _run(own: argparse.Namespace, settings: Settings) -> int:
    wrong = [key for key in ("num_gpus", "gpu_memory", "link_gbps") if not getattr(own, key) > 0]
    if wrong:
        raise RequestError([f"--{key} must be above 0" for key in wrong])
    config = read_model_config(settings.base)
    shape = config.shape
    facts = Facts(own.num_gpus, shape.hidden_size, settings.train.computes_in_bf16(on_gpu=True))
    ds_configs = read_deepspeed_files(settings.train, facts)
    asked, files = asked_way(settings, shape, ds_configs, own.num_gpus, on_gpu=True)
    setup, limit = asked.setup, int(own.gpu_memory * GIB * USABLE)
    found = ways(asked, files)
    spare = (limit - asked.budget.total) / GIB
    print(
        f"{own.num_gpus} x {own.gpu_memory:g} GB, of which {limit / GIB:.2f} GiB can be used; "
        f"deepspeed: {asked.file}\nan optimizer step has at most {setup.step_tokens:,} tokens per "
        f"GPU, in documents of up to {setup.longest:,}",
        *table(asked.budget, own.explain),
        f"{'fits' if spare >= 0 else 'does not fit'}: {spare:+.2f} GiB of headroom",
        *_kept(settings, asked, limit),
        *_comparison(found, limit, own),
        *_longest(setup, files, limit),
        *_advice(config, setup.adapter, settings, own.num_gpus),
        sep="\n",
    )
    if spare < 0:
        offers = nearest_that_fit(asked, files, limit)
        print("\nnearest settings that fit:" if offers else "\nnothing fits, whatever is set")
        for option in offers:
            print(f"  {option.budget.total / GIB:6.2f} GiB  {', '.join(option.changes(asked))}")
    if own.plot:
        with drawing("--plot", own.plot):
            _plot(own.plot, found, limit)
    return 0 if spare >= 0 else 1


def table(needs: Budget, explain: bool = False) -> Iterator[str]:
    """Lines: every term in GiB (and its formula), the sum of each part, the total, the host."""
    for part, total in needs.parts.items():
        yield f"{part:<40}{total / GIB:8.2f} GiB"
        for term in (term for term in needs.terms if term.part == part):
            how = f"  = {term.formula}" * explain
            yield f"  {term.name:<38}{term.bytes / GIB:8.2f}{how}"
    yield f"{'a GPU at its fullest: ' + needs.fullest:<40}{needs.total / GIB:8.2f} GiB"
    if explain:
        phases = (f"{phase} {most / GIB:.2f}" for phase, most in needs.phases.items())
        yield f"  tensors at the fullest of each phase: {', '.join(phases)}"
    for term in (term for term in needs.host if term.bytes):
        how = f"  = {term.formula}" * explain
        yield f"{'the host: ' + term.name:<40}{term.bytes / GIB:8.2f} GiB{how}"


def _kept(settings: Settings, asked: Way, limit: int) -> Iterator[str]:
    """What a run does with the headroom where the settings leave it to the run."""
    if settings.keeps_what_fits:
        way, layers = keep_most_blocks(asked.setup, limit), asked.setup.shape.num_layers
        spans = "" if way.gather_tokens == asked.setup.gather_tokens else " (in spans of a tile)"
        yield (
            f"{way.keep_blocks} of {layers} blocks would keep their activations{spans}, more with "
            "shorter rows: see keep_blocks"
        )
    yield ""


def _comparison(found: Sequence[Way], limit: int, own: argparse.Namespace) -> Iterator[str]:
    """A line per file, way and gather_tokens; a column per tile_tokens.

    Of a file's way that fits with nothing only the smallest is shown, or all if explained.
    """
    tiles, chosen = (
        sorted({option.setup.tile_tokens for option in found}),
        recommended(found, limit),
    )
    yield "the same step in other ways, GiB per GPU: (does not fit), * recommended"
    tile_names = "".join(f"{f'tile {tile}':>11}" for tile in tiles)
    yield f"{'deepspeed':<16}{'blocks':<12}{'gather':>7}{tile_names}{'gathered':>12}{'seconds':>9}"

    for (file, blocks), alike in groupby(found, lambda option: (option.file, option.blocks)):
        lines, fits = [], False
        for gather, row in groupby(alike, lambda option: option.setup.gather_tokens):
            cells = dict.fromkeys(tiles, "")
            for option in row:
                gib, good = f"{option.budget.total / GIB:.2f}", option.budget.total <= limit
                cell = gib + (" *"[option is chosen]) if good else f"({gib})"
                cells[option.setup.tile_tokens], fits = cell, fits or good
            received = option.budget.gathered * (own.num_gpus - 1) / own.num_gpus
            numbers = "".join(f"{cells[tile]:>11}" for tile in tiles)
            lines.append(f"{file:<16}{blocks:<12}{gather or 'step':>7}{numbers}"
                         f"{option.budget.gathered / 1e9:>9.1f} GB"
                         f"{received * 8 / own.link_gbps / 1e9:>9.1f}")  # fmt: skip
        yield from lines if fits or own.explain else lines[-1:]
    if chosen is None:
        yield f"none is recommended: none leaves {1 - MARGIN:.0%} free"


def _longest(setup: MemoryJob, files: Mapping[str, Zero], limit: int) -> Iterator[str]:
    """Lines: the longest context by file, with block inputs on the GPU and on the host."""
    yield "\nlongest document that fits, alone in its span, in tokens (inputs offloaded):"
    for file, zero in files.items():
        ways = [replace(setup, zero=zero), replace(setup, zero=zero, offload_activations=True)]
        here, away = (longest_document(way, limit) for way in ways)
        yield f"  {file:<16}{here:>10,}{f'({away:,})' * (setup.keep_blocks == 0):>12}"


def _advice(config: ModelConfig, lora: LoraShape, settings: Settings, ranks: int) -> Iterator[str]:
    """A line on the learning rate and the step, after an empty one; none where all is usual."""
    train = settings.train
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps * ranks
    lines = advice(config.values["model_type"], config.shape, lora, train, Amounts(rows))
    yield from ["", *lines] if lines else []


def _plot(path: str, found: Sequence[Way], limit: int) -> None:
    """Bars in their parts of ways that come near the limit, named by file, blocks and gather."""
    usual = {found[0].setup.gather_tokens, None, 8192}
    shown = [o for o in found if o.setup.gather_tokens in usual and o.budget.total < 2 * limit]
    shown = [o for o in shown if o.setup.tile_tokens == TILES[0]]
    names = [f"{o.file}, {o.blocks}, {o.setup.gather_tokens or 'step'}" for o in shown]
    figure = new_figure(9, 1.5 + 0.25 * len(shown))
    axes, left = figure.subplots(), [0.0] * len(shown)
    for part, colour in COLOURS.items():
        widths = [o.budget.parts.get(part, 0) / GIB for o in shown]
        axes.barh(names, widths, left=left, color=colour, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.axvline(limit / GIB, color="black")
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("GiB per GPU; the line is what the card has")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.stdout = Lasting(sys.stdout.buffer)
    sys.exit(main())
