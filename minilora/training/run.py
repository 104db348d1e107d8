"""One run from start to end: checked, built, trained, saved."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain

import torch

from minilora import __version__
from minilora.data.schedule import Schedule
from minilora.files.deepspeed_file import Facts, read_deepspeed_files
from minilora.files.output_folder import claimed
from minilora.files.snapshot import last_snapshot
from minilora.memory.in_a_run import OutOfMemory, foresee
from minilora.memory.measured import is_out_of_memory, read_memory
from minilora.memory.ways import asked_way
from minilora.processes.signals import Stopped
from minilora.processes.startup_times import StartupTimes
from minilora.processes.world import World
from minilora.report.run_log import Report, Totals
from minilora.settings.errors import RunError
from minilora.settings.settings import Settings
from minilora.training.checks import check
from minilora.training.engine import Engine, ModelRecipe
from minilora.training.loop import Job, train
from minilora.training.shared_documents import tokenise
from minilora.training.starting_point import start_of


def run(settings: Settings) -> None:
    """Check everything, build, train, save.

    Raises RequestError before the first step, RunError or Stopped for what happens in the run.
    """
    phases = StartupTimes()
    phases.done("imports")
    plan = check(settings)
    phases.done("checks")
    world = World(settings.train)
    output = settings.output
    try:
        world.try_links()
        with ExitStack() as stack:
            with world.agreed():
                if world.rank == 0:
                    stack.enter_context(claimed(output))
            phases.done("processes")
            run_in(world, settings, plan, phases)
            world.close()
    except (RunError, Stopped) as error:
        error.args = ("; ".join([str(error), *world.watch.lost().values(), last_snapshot(output)]),)
        if isinstance(error, OutOfMemory):
            error.tell(world)
        raise
    except RuntimeError as error:  # a collective's, if a rank is lost: then there is no return
        if not is_out_of_memory(error):
            world.watch.settle(error)
        raise
    finally:
        world.watch.over.set()


def run_in(world: World, settings: Settings, plan: ModelRecipe, phases: StartupTimes) -> None:
    """Train in processes that are there already. Collective."""
    options = settings.train
    documents, validation, notes = tokenise(world, settings, plan.checkpoint.shape)
    with world.agreed():
        snapshot, start, saved = start_of(settings, plan, documents, validation)
    shape = plan.checkpoint.shape
    schedule = Schedule.of(
        documents.lengths,
        settings,
        world.size,
        shape.break_even_length,
        (start.step, start.rows),
    )
    phases.done("tokens")
    facts = Facts(
        world.size, shape.hidden_size, options.computes_in_bf16(torch.cuda.is_available())
    )
    ds_configs = read_deepspeed_files(options, facts)
    asked, files = asked_way(settings, shape, ds_configs, world.size, torch.cuda.is_available())
    forecast = foresee(world, asked, files, plan.lora, schedule, settings.keeps_what_fits)
    # Before the weights, which may take their time.
    _tell(world, settings.notices, notes, forecast.opening(options.strict_plan))
    decided = forecast.decided.job
    options = replace(options, gather_tokens=decided.gather_tokens)
    settings = replace(settings, train=options)
    plan = replace(plan, keep_blocks=decided.keep_blocks)
    with forecast.explaining(world.rank, options):
        engine = Engine(world, plan, phases)
        if snapshot is not None:
            engine.restore(saved, start.step)
            was = f"{start.info['ranks']} ranks, ZeRO-{start.info['stage']}"
            reached = f"step {start.step} of {schedule.total_steps}"
            found = [f"going on from {snapshot}, {reached} ({was})"]
            _tell(world, found, start.info.get("notes", ()))
        _tell(world, _facts(world, engine, plan, schedule), [str(phases)])
        info = {"ranks": world.size, "stage": engine.stage, "settings": settings.to_dict()}
        info["versions"] = {"minilora": __version__, "torch": torch.__version__}
        totals = Totals(**start.totals)
        with Report(options, schedule.total_steps, world.rank == 0, totals) as report:
            start = replace(start, info=info)
            job = Job(settings, documents, schedule, plan.lora, start, validation)
            report.finish(**train(world, engine, job, report).results)
            report.message(forecast.closing(world.gather_objects(read_memory(world.device))))
            report.message(f"the adapter is in {options.output_dir}")


def _tell(world: World, *groups: Iterable[str]) -> None:
    """Rank 0 prints the lines of all groups."""
    if world.rank == 0:
        print(*chain(*groups), sep="\n", file=sys.stderr, flush=True)


def _facts(world: World, engine: Engine, plan: ModelRecipe, schedule: Schedule) -> Iterator[str]:
    """What a user wants to see confirmed before the first step."""
    total, trained = plan.checkpoint.total_bytes, plan.lora.size(plan.checkpoint.shape)
    yield (
        f"ZeRO-{engine.stage} on {world.size} x {world.device.type}, {engine.dtype}; each process "
        f"read {engine.bytes_read / 1e9:.4g} of {total / 1e9:.4g} GB"
    )
    yield (
        f"{plan.lora}: {trained:,} parameters; "
        f"{schedule.total_steps} optimizer steps of {schedule.rows_per_step} rows"
    )
    layers = plan.checkpoint.shape.num_layers
    others = ", the others recompute them" * (plan.keep_blocks < layers)
    yield f"{plan.keep_blocks} of {layers} blocks keep their activations{others}"
