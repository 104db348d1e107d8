"""One run from start to end: checked, joined, tokenised, planned, built, trained, saved."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch

from minilora import __version__
from minilora.data.documents import Documents
from minilora.data.schedule import Schedule
from minilora.data.steps import TileLimits
from minilora.data.tokenizer_files import TokenizerFiles
from minilora.files.deepspeed_file import zero_stage
from minilora.files.model_card import CARD, adapter_card, write_card
from minilora.files.output_folder import claimed
from minilora.files.rotation import delete_drafts
from minilora.files.snapshot import State
from minilora.files.weights import Checkpoint, check_tied_head
from minilora.memory.in_a_run import Forecast, OutOfMemory, foresee
from minilora.memory.job import MemoryJob
from minilora.memory.measured import is_out_of_memory, read_memory
from minilora.memory.spare import Open
from minilora.processes.launcher import check_launcher
from minilora.processes.signals import Stopped
from minilora.processes.startup_times import StartupTimes
from minilora.processes.world import World
from minilora.report.run_log import RESULTS, Report, Totals
from minilora.settings.errors import RequestError, RunError
from minilora.settings.settings import Settings, TrainSettings
from minilora.settings.text_files import read_json
from minilora.training.advice import Amounts, advice
from minilora.training.checks import CheckedRequest, check
from minilora.training.engine import Engine
from minilora.training.job import Job
from minilora.training.loop import train
from minilora.training.remaining_steps import check_rates, is_finished, nothing_left
from minilora.training.same_machines import (
    check_same_data,
    check_same_settings,
    check_same_weights,
)
from minilora.training.same_run import base_digest, data_digests
from minilora.training.shared_documents import shared_documents
from minilora.training.starting_point import StartingPoint, shared_starting_point


def run(asked: Settings | RequestError) -> None:
    """Join the processes, check everything, train, save.

    asked: or what is wrong with the settings of this machine, which all are to learn. Raises
    RequestError before the first step, RunError or Stopped for what happens in the run.
    """
    times = StartupTimes()
    times.finished("imports")
    check_launcher()
    request = asked if isinstance(asked, RequestError) else _checked(asked)
    times.finished("checks")

    # The ranks join before anything that was found wrong is raised, so that nobody waits for a
    # machine that has given up, and before a GPU is touched.
    train = TrainSettings() if isinstance(asked, RequestError) else asked.train
    world = World(train)
    try:
        with world.agreed():
            if isinstance(request, RequestError):
                raise request
        assert isinstance(request, CheckedRequest)
        check_same_settings(world, request)
        world.open_device(train)
        world.try_links()
        with ExitStack() as stack:
            with world.agreed():
                if world.rank == 0:
                    stack.enter_context(claimed(request.settings.output))
                    delete_drafts(request.settings.output)
            world.announce_snapshot(request.settings.output)
            times.finished("processes")
            run_in(world, request, times)
            world.close()

    # Whatever ended the run, the user learns which ranks are gone, and where to resume.
    except (RunError, Stopped) as error:
        what_is_left = [*world.watch.lost().values(), world.watch.last_snapshot()]
        world.watch.leave_word(str(error))
        error.args = ("; ".join([str(error), *what_is_left]),)
        if isinstance(error, OutOfMemory):
            error.tell(world)
        raise
    except RequestError:
        raise
    except Exception as error:
        # A collective raises a RuntimeError where a rank is lost; `settle` then ends the process.
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            world.watch.settle(error)
        world.watch.leave_word(f"rank {world.rank}: {type(error).__name__}: {error}")
        raise
    finally:
        world.watch.over.set()


def _checked(settings: Settings) -> CheckedRequest | RequestError:
    try:
        return check(settings)
    except RequestError as error:
        return error


def run_in(world: World, request: CheckedRequest, times: StartupTimes) -> None:
    """Train in processes that have joined already. Collective."""
    settings, shape = request.settings, request.checkpoint.shape

    # Data first: the memory plan goes by the real lengths of the documents.
    documents, validation, base, notes = shared_documents(world, settings, shape)
    check_same_data(world, request, documents, validation, base)
    check_same_weights(world, request.checkpoint)
    with world.agreed():
        if world.leads:
            check_tied_head(request.checkpoint)
    info = about(world, request, base)
    start = shared_starting_point(world, request, documents, validation, info)
    done = (start.state.step, start.state.rows)
    schedule = Schedule.of(documents.lengths, settings, world.size, shape.break_even_length, done)
    times.finished("tokens")

    # A run may have no step left, or only steps that would change nothing.
    check_rates(settings, start.state.step, schedule.total_steps)
    end = nothing_left(start, settings, schedule.total_steps)
    if end is not None:
        tell(world, [end])
        finished = world.rank == 0 and is_finished(start, settings)
        if world.gather_objects(finished)[0]:
            return

    # What the plan decides stands beside what was asked: neither overwrites the other.
    asked, files = request.asked_way(world.size)
    forecast = foresee(world, asked, files, request.lora, schedule, Open.of(settings))
    decided = forecast.decided.job
    tell(world, settings.notices, notes, forecast.opening(settings.train.strict_plan))
    tell(world, advice_on(request, documents, world.size))

    with forecast.explaining(world.rank, settings.train):
        engine = Engine(world, request.recipe(decided), times)
        state = put_back(start, engine, request.checkpoint, info)
        if start.snapshot is not None:
            tell(world, [resumes_from(start, schedule)])
        tell(world, start.notes, facts(request, engine, schedule, decided), [str(times)])

        totals = Totals(**start.state.log_totals)
        log = Report(settings.train, schedule.total_steps, world.rank == 0, totals)
        with log:
            job = Job(
                world=world,
                engine=engine,
                settings=settings,
                documents=documents,
                validation=validation,
                schedule=schedule,
                limits=TileLimits(decided.tile_tokens, decided.gather_tokens),
                lora=request.lora,
                base=base,
                start=state,
                log=log,
            )
            best = train(job)
            finish(job, best.results, forecast)


def put_back(
    start: StartingPoint, engine: Engine, checkpoint: Checkpoint, info: dict[str, Any]
) -> State:
    """The state that the run starts from, and what its snapshot holds in the engine. Collective.

    Raises RequestError for base weights that are not those that the snapshot was made with.
    """
    world = engine.world
    state = start.state_with(info, base_digest(checkpoint, engine.base_sums))
    if start.snapshot is not None:
        engine.restore(lambda name: world.from_rank0(start.tensors.get(name)), state.step)
    return state


def finish(job: Job, results: dict[str, float], forecast: Forecast) -> None:
    """Write the results, and compare the memory plan with what was measured. Collective."""
    job.log.finish(**results)
    if job.world.rank == 0:
        leave_card(job)
    measured = job.world.gather_objects(read_memory(job.world.device))
    job.log.message(forecast.closing(measured))
    job.log.message(f"the adapter is in {job.settings.train.output_dir}")


def leave_card(job: Job) -> None:
    """Write README.md beside the adapter. Rank 0 alone; that it cannot be written ends no run."""
    settings = job.settings
    values = settings.to_dict()
    given = {key: values[key] for key in values if key in settings.origins}
    try:
        results = read_json(settings.output / RESULTS)
        write_card(
            settings.output, adapter_card(settings.base, settings.data.dataset, given, results)
        )
    except (OSError, RequestError) as error:
        job.log.message(f"warning: {CARD} is not written: {error}")


def about(world: World, request: CheckedRequest, base: TokenizerFiles) -> dict[str, Any]:
    """What snapshots tell people of their run: the settings as they were asked. Collective.

    base: the tokenizer's files, which rank 0 has. Raises RequestError.
    """
    files: dict[str, str] = {}
    with world.agreed():
        if world.rank == 0:
            files = data_digests(request.settings, base)
    return {
        "ranks": world.size,
        "stage": zero_stage(request.ds_config),
        "settings": request.settings.to_dict(),
        "data files": world.gather_objects(files)[0],
        "versions": {"minilora": __version__, "torch": torch.__version__},
    }


def advice_on(request: CheckedRequest, documents: Documents, ranks: int) -> Iterator[str]:
    """A line on the learning rate, the step and the rank, where there is something to say.

    A generator, because only rank 0 asks for the line, which takes a look at all documents.
    """
    settings, shape = request.settings, request.checkpoint.shape
    schedule = Schedule.of(documents.lengths, settings, ranks, shape.break_even_length)
    amounts = Amounts.of(documents, schedule)
    yield from advice(request.model_type, shape, request.lora, settings.train, amounts)


def tell(world: World, *groups: Iterable[str]) -> None:
    """Rank 0 prints the lines of all groups."""
    if world.rank == 0:
        for line in chain(*groups):
            print(line, file=sys.stderr, flush=True)


def resumes_from(start: StartingPoint, schedule: Schedule) -> str:
    """One line about the snapshot that a run resumes from."""
    info, reached = start.state.about, f"step {start.state.step}"
    if start.state.step <= schedule.total_steps:
        reached += f" of {schedule.total_steps}"
    return (
        f"resuming from {start.snapshot}, {reached} ({info['ranks']} ranks, ZeRO-{info['stage']})"
    )


def facts(
    request: CheckedRequest, engine: Engine, schedule: Schedule, decided: MemoryJob
) -> Iterator[str]:
    """Lines that confirm, before the first step, what is about to be trained and how."""
    world, checkpoint = engine.world, request.checkpoint
    total, layers = checkpoint.total_bytes, checkpoint.shape.num_layers
    yield (
        f"ZeRO-{engine.stage} on {world.size} x {world.device.type}, {engine.dtype}; each process "
        f"read {engine.bytes_read / 1e9:.4g} of {total / 1e9:.4g} GB"
    )
    yield (
        f"{request.lora}: {request.lora.size(checkpoint.shape):,} parameters; "
        f"{schedule.total_steps} optimizer steps of {schedule.rows_per_step} rows"
    )
    if checkpoint.shape.packed:
        yield "the weights of the blocks' linear layers are held in 4 bits (NF4)"
    keeping = decided.keep_blocks
    others = ", the others recompute them" if keeping < layers else ""
    yield f"{keeping} of {layers} blocks keep their activations{others}"
    gather_tokens = decided.gather_tokens or "the whole step"
    yield f"tile_tokens: {decided.tile_tokens}; gather_tokens: {gather_tokens}"
