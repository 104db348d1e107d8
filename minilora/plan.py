"""Will it fit? `python -m minilora.plan CONFIG --num_gpus 7 --gpu_memory 24` says it beforehand.

With `--num_nodes 2` there are two machines of 7 GPUs each, and what goes between them is counted.
It needs the config.json of the base model alone: no weights, no GPU, no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from minilora.files.deepspeed_file import Facts, read_deepspeed_files
from minilora.files.model_config import ModelConfig, read_model_config
from minilora.files.model_families import window_problem
from minilora.memory.comparison import comparison
from minilora.memory.job import MemoryJob
from minilora.memory.peak import GIB, PeakMemory
from minilora.memory.spare import Open, use_spare_memory
from minilora.memory.terms import Term
from minilora.memory.traffic import Links, received, seconds, waited_for
from minilora.memory.ways import (
    MARGIN,
    TILES,
    Way,
    asked_way,
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
    parser.add_argument("--num_nodes", type=int, default=1, help="machines")
    parser.add_argument("--num_gpus", type=int, default=1, help="of each machine")
    parser.add_argument("--gpu_memory", type=float, default=24, help="GB, as the card is sold")
    parser.add_argument("--link_gbps", type=float, default=80, help="Gbit/s into each GPU")
    parser.add_argument("--node_gbps", type=float, default=10, help="Gbit/s into each machine")
    parser.add_argument("--explain", action="store_true", help="each tensor, and each number's sum")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the ways that are compared")
    return parser


def _run(own: argparse.Namespace, settings: Settings) -> int:
    numbers = ("num_nodes", "num_gpus", "gpu_memory", "link_gbps", "node_gbps")
    wrong = [key for key in numbers if not getattr(own, key) > 0]
    if wrong:
        raise RequestError([f"--{key} must be above 0" for key in wrong])

    # What is asked for, and what a GPU has.
    config = read_model_config(settings.base, settings.model.quantization_bit)
    shape = config.shape
    if problems := window_problem(shape, settings.data.cutoff_len, "cutoff_len"):
        raise RequestError(problems)
    ranks, bf16 = own.num_nodes * own.num_gpus, settings.train.computes_in_bf16(on_gpu=True)
    facts = Facts(ranks, shape, bf16, machine_ranks=own.num_gpus)
    asked, files = _asked(settings, facts)
    links = Links(own.link_gbps, own.node_gbps)
    limit = int(own.gpu_memory * GIB * USABLE)
    spare = limit - asked.peak.total
    fits = spare >= 0

    # What it needs, and whether it fits.
    machines = f"{own.num_nodes} x " if own.num_nodes > 1 else ""
    print(
        f"{machines}{own.num_gpus} x {own.gpu_memory:g} GB, of which {limit / GIB:.2f} GiB can be "
        f"used; deepspeed: {asked.file}"
    )
    print(
        f"an optimizer step has at most {asked.job.step_tokens:,} tokens per GPU, in documents of "
        f"up to {asked.job.longest:,}"
    )
    host = "each host: " if own.num_nodes > 1 else "the host: "
    print(*_table(asked.peak, own.explain, host), sep="\n")
    print(f"{'fits' if fits else 'does not fit'}: {spare / GIB:+.2f} GiB of headroom")
    if any(Open.of(settings)):
        print(_decided(asked.job, limit, Open.of(settings)))

    # What else could be done.
    compared = ways(asked, files)
    best = recommended(compared, limit, links)
    print("", *comparison(compared, limit, best, links, own.explain), sep="\n")
    print("", *_longest(asked.job, files, limit), sep="\n")
    for line in _advice(config, asked.job.adapter, settings, ranks):
        print(line)
    if not fits:
        print("", *_nearest(asked, files, limit), *_in_four_bits(settings, facts, limit), sep="\n")
    if own.num_nodes > 1:
        chosen = (asked, best)
        print("", *_between_machines(chosen, settings, facts, limit, links), sep="\n")
    if own.plot:
        with drawing("--plot", own.plot):
            _plot(own.plot, compared, limit)
    return 0 if fits else 1


def _asked(settings: Settings, facts: Facts) -> tuple[Way, dict[str, Zero]]:
    """What the settings ask for, and the DeepSpeed files that could serve."""
    ds_configs = read_deepspeed_files(settings.train, facts)
    machines = facts.world_size // (facts.machine_ranks or facts.world_size)
    ranks = facts.world_size
    return asked_way(settings, facts.shape, ds_configs, ranks, on_gpu=True, machines=machines)


def _table(peak: PeakMemory, explain: bool, host: str) -> Iterator[str]:
    """Lines in GiB: every term under the sum of its part, the total, and the host.

    explain: with the tensors that a term consists of, and a formula for each number. host: what
    the lines of the host begin with.
    """
    for part, total in peak.parts.items():
        yield f"{part:<40}{total / GIB:8.2f} GiB"
        for term in peak.terms:
            if term.part == part:
                formula = f"  = {term.formula}" if explain and not term.tensors else ""
                yield f"  {term.name:<38}{term.bytes / GIB:8.2f}{formula}"
                if explain:
                    yield from _tensors(term)

    yield f"{'peak of a GPU: ' + peak.peak_moment:<40}{peak.total / GIB:8.2f} GiB"
    if explain:
        moments = (f"{moment} {most / GIB:.2f}" for moment, most in peak.by_moment.items())
        yield f"  GiB of tensors at the worst of each moment: {', '.join(moments)}"

    for term in peak.host:
        if term.bytes:
            formula = f"  = {term.formula}" if explain else ""
            yield f"{host + term.name:<40}{term.bytes / GIB:8.2f} GiB{formula}"


def _tensors(term: Term) -> Iterator[str]:
    """What a term consists of, and where in minilora/model each tensor is made."""
    for tensor in term.tensors:
        if tensor.elements:
            size = tensor.elements * term.each / GIB
            made = f"  ({tensor.made})" if tensor.made else ""
            yield f"    {tensor.name:<36}{size:8.2f}  = {tensor.origin} x {term.each} B{made}"


def _decided(job: MemoryJob, limit: int, left_open: Open) -> str:
    """What a run does with the headroom where the settings leave it to the run."""
    decided = use_spare_memory(job, limit, left_open)
    tile = f"tiles of {decided.tile_tokens:,} tokens"
    spans = " in spans of a tile," if decided.gather_tokens != job.gather_tokens else ""
    blocks = f"{decided.keep_blocks} of {job.shape.num_layers} blocks"
    return f"a run would take {tile},{spans} and {blocks} would save their activations"


def _longest(job: MemoryJob, files: Mapping[str, Zero], limit: int) -> Iterator[str]:
    """Lines: the longest context by file, with block inputs on the GPU and on the host."""
    yield "longest document that fits, alone in its span, in tokens (inputs offloaded):"
    for file, zero in files.items():
        here = longest_document(replace(job, zero=zero), limit)
        line = f"  {file:<16}{here:>10,}"
        if job.keep_blocks == 0:
            offloading = replace(job, zero=zero, offload_activations=True)
            line += f"{f'({longest_document(offloading, limit):,})':>12}"
        yield line


def _nearest(asked: Way, files: Mapping[str, Zero], limit: int) -> Iterator[str]:
    """Lines: ways that fit, by what has to be changed."""
    fitting = nearest_that_fit(asked, files, limit)
    yield "nearest settings that fit:" if fitting else "nothing fits, whatever is set"
    for way in fitting:
        yield f"  {way.peak.total / GIB:6.2f} GiB  {', '.join(way.changes(asked))}"


def _advice(config: ModelConfig, lora: LoraShape, settings: Settings, ranks: int) -> Iterator[str]:
    """A line on the learning rate and the step, after an empty one; none where all is usual."""
    train = settings.train
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps * ranks
    lines = advice(config.values["model_type"], config.shape, lora, train, Amounts(rows))
    if lines:
        yield from ["", *lines]


def _in_four_bits(settings: Settings, facts: Facts, limit: int) -> Iterator[str]:
    """Lines: what would fit if the frozen weights were packed, where they are not and can be."""
    packed = _packed(facts)
    if packed is None:
        return
    asked, files = _asked(settings, packed)
    fitting = [asked] if asked.peak.total <= limit else nearest_that_fit(asked, files, limit)[:1]
    for way in fitting:
        yield "with frozen weights in 4 bits, which changes the losses a little:"
        changes = ", ".join(["quantization_bit: 4", *way.changes(asked)])
        yield f"  {way.peak.total / GIB:6.2f} GiB  {changes}"


def _packed(facts: Facts) -> Facts | None:
    """The same with frozen weights in 4 bits; None where they are already, or cannot be."""
    if facts.shape.packed:
        return None
    try:
        return replace(facts, shape=facts.shape.in_bits(4))
    except RequestError:  # its rows cannot be cut into blocks of 64 weights
        return None


def _between_machines(
    chosen: tuple[Way, Way | None], settings: Settings, facts: Facts, limit: int, links: Links
) -> Iterator[str]:
    """Lines: what the recommended way moves between machines, and in 4 bits if that is better.

    chosen: what is asked for, and what is recommended. The time on all links says what is less.
    """
    asked, best = chosen
    yield f"recommended at {links.between:g} Gbit/s, with what comes from other machines in a step:"
    if best is None:
        yield f"  none leaves {1 - MARGIN:.0%} free"
    else:
        yield _recommendation(best, best.changes(asked), links)

    if packed := _packed(facts):
        asked, files = _asked(settings, packed)
        way = recommended(ways(asked, files), limit, links)
        if way and not (best and waited_for(best.job, links) <= waited_for(way.job, links)):
            yield _recommendation(way, ["quantization_bit: 4", *way.changes(asked)], links)


def _recommendation(way: Way, changes: Sequence[str], links: Links) -> str:
    moved, taken = received(way.job).between / 1e9, seconds(way.job, links)[1]
    return f"  {moved:6.2f} GB, {taken:6.2f} s  {', '.join(changes) or 'as it is'}"


def _plot(path: str, compared: Sequence[Way], limit: int) -> None:
    """Bars in their parts, of ways that come near the limit, by file, blocks and gather_tokens."""
    usual = {compared[0].job.gather_tokens, None, 8192}
    shown = [
        way
        for way in compared
        if way.job.gather_tokens in usual
        and way.job.tile_tokens == TILES[0]
        and way.peak.total < 2 * limit
    ]
    names = [f"{way.file}, {way.blocks}, {way.job.gather_tokens or 'step'}" for way in shown]

    figure = new_figure(9, 1.5 + 0.25 * len(shown))
    axes = figure.subplots()
    left = [0.0] * len(shown)
    for part, colour in COLOURS.items():
        widths = [way.peak.parts.get(part, 0) / GIB for way in shown]
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
