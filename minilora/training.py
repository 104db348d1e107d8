"""One run from start to end: checked, built, trained, saved."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from minilora import __version__
from minilora.config import RequestError, RunError, Settings, TrainSettings
from minilora.data.records import read_conversations
from minilora.data.schedule import Schedule
from minilora.data.tokenizer import load_tokenizer
from minilora.files.adapter import CONFIG, read_adapter, read_adapter_shape
from minilora.files.snapshot import check_room, claimed, find_snapshot, last_snapshot
from minilora.files.weights import read_checkpoint, read_config
from minilora.model.lora_shape import LoraShape
from minilora.model.shape import LlamaShape
from minilora.plan import asked_for
from minilora.run.curves import LOG
from minilora.run.ds_config import Facts, find_ds_config, resolve_ds_config
from minilora.run.engine import Engine, Plan
from minilora.run.forecast import OutOfMemory, foresee
from minilora.run.loop import Job, train
from minilora.run.memory import is_out_of_memory, read_memory
from minilora.run.phases import Phases
from minilora.run.report import Report, Totals
from minilora.run.resume import start_of
from minilora.run.setup import kept_blocks
from minilora.run.stop import Stopped
from minilora.run.tokenise import tokenise
from minilora.run.world import World, wants_bf16


def run(settings: Settings) -> None:
    """Check everything, build, train, save.

    Raises RequestError before the first step, RunError or Stopped for what happens in the run.
    """
    phases = Phases()
    phases.done("imports")
    plan = check(settings)
    phases.done("checks")
    world = World(settings.train)
    assert settings.train.output_dir
    output = Path(settings.train.output_dir)
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


def run_in(world: World, settings: Settings, plan: Plan, phases: Phases) -> None:
    """Train in processes that are there already. Collective."""
    options = settings.train
    documents, validation, notes = tokenise(world, settings)
    with world.agreed():
        snapshot, start, saved = start_of(settings, plan, documents, validation)
    schedule = Schedule.of(documents.lengths, settings, world.size, (start.step, start.rows))
    phases.done("tokens")
    asked = asked_for(settings, world.size, wants_bf16(options))
    forecast = foresee(world, asked, plan, schedule, settings.keeps_what_fits)
    # Before the weights, which may take their time.
    _tell(world, settings.notices, notes, forecast.opening(options.strict_plan))
    way = forecast.asked.setup
    options = replace(options, gather_tokens=way.gather_tokens)
    settings, plan = replace(settings, train=options), replace(plan, keep_blocks=way.keep_blocks)
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
            even = engine.shape.even_length
            job = Job(settings, documents, schedule, plan.lora, start, validation, even)
            report.finish(**train(world, engine, job, report).results)
            report.message(forecast.closing(world.gather_objects(read_memory(world.device))))
            report.message(f"the adapter is in {options.output_dir}")


def check(settings: Settings) -> Plan:
    """Check weights, adapter, DeepSpeed file and output folder, and report all problems at once."""
    problems: list[str] = []
    train_settings = settings.train
    shape = checkpoint = lora = adapter = None
    model = Path(settings.model.model_name_or_path or "")
    with _noting(problems):
        _, shape = read_config(model)
        checkpoint = read_checkpoint(model)
    if shape is not None:
        with _noting(problems):
            lora, adapter = _adapter(settings, shape)
    with _noting(problems):
        _check_output(train_settings)
    with _noting(problems):
        find_snapshot(Path(train_settings.output_dir or ""), train_settings.resume_from_checkpoint)
    if shape is not None and lora is not None:
        with _noting(problems):
            check_room(Path(train_settings.output_dir or ""), 4 * lora.size(shape))
    keep_blocks = 0
    with _noting(problems):
        keep_blocks = kept_blocks(settings, shape) if shape is not None else 0
    ds_config = {}
    with _noting(problems):
        path = find_ds_config(train_settings.deepspeed)
        if shape is not None:
            facts = Facts(
                world_size=int(os.environ.get("WORLD_SIZE", "1")),
                hidden_size=shape.hidden_size,
                bf16=wants_bf16(train_settings),
            )
            ds_config = resolve_ds_config(path, train_settings, facts)
    if train_settings.memory_snapshot and not torch.cuda.is_available():
        problems.append("memory_snapshot: torch notes a GPU's memory, and there is none; remove it")
    if problems or checkpoint is None or lora is None or adapter is None:
        raise RequestError([*problems, *_data_problems(settings, tokenizer=shape is not None)])
    return Plan(checkpoint, lora, adapter, train_settings, ds_config, keep_blocks)


def _data_problems(settings: Settings, tokenizer: bool) -> list[str]:
    """What is wrong with the data of a request that is refused anyway; rank 0 alone tells it."""
    problems: list[str] = []
    if os.environ.get("RANK", "0") == "0":
        if tokenizer:
            with _noting(problems):
                load_tokenizer(Path(settings.model.model_name_or_path or ""))
        for names in filter(None, (settings.data.dataset, settings.data.eval_dataset)):
            with _noting(problems):
                read_conversations(names, settings.data, settings.method.stage)
    return problems


def _adapter(settings: Settings, shape: LlamaShape) -> tuple[LoraShape, Mapping[str, Tensor]]:
    """The shape of the adapter, and what it starts from if it continues another."""
    method, folder = settings.method, settings.model.adapter_name_or_path
    asked = LoraShape.of(method, shape)
    if folder is None:
        return asked, {}
    if not Path(folder).is_dir():
        lacks = "no such folder; name one adapter, several are merged first (minilora.merge)"
        raise RequestError([f"adapter_name_or_path: {folder}: {lacks}"])
    lora = read_adapter_shape(Path(folder), shape, method.lora_dropout)
    problems = [
        f"{settings.name_of(key)}: {mine} contradicts the {has} of {folder}; remove the key"
        for key, mine, has in (
            ("lora_rank", asked.rank, lora.rank),
            ("lora_alpha", asked.alpha, lora.alpha),
            ("use_rslora", asked.use_rslora, lora.use_rslora),
            ("use_dora", asked.use_dora, lora.use_dora),
            ("rank_pattern", asked.rank_pattern, lora.rank_pattern),
            ("alpha_pattern", asked.alpha_pattern, lora.alpha_pattern),
            ("additional_target", {*asked.modules_to_save}, {*lora.modules_to_save}),
        )
        if key in settings.origins and mine != has
    ]
    if "lora_target" in settings.origins and {*asked.layers(shape)} != {*lora.layers(shape)}:
        name = settings.name_of("lora_target")
        problems.append(f"{name} means other layers than those of {folder}; remove the key")
    if problems:
        raise RequestError(problems)
    return lora, read_adapter(Path(folder), lora.parameter_shapes(shape))


def _check_output(settings: TrainSettings) -> None:
    """Refuse to write over another run."""
    assert settings.output_dir
    folder = Path(settings.output_dir)
    resumes = (settings.resume_from_checkpoint or "false").lower() != "false"
    holds_run = any((folder / name).exists() for name in (LOG, CONFIG))
    if holds_run and not (settings.overwrite_output_dir or resumes):
        raise RequestError(
            [
                f"output_dir: {folder} holds a run; name another, go on with it "
                "(resume_from_checkpoint: true), or set overwrite_output_dir: true"
            ]
        )


def _tell(world: World, *groups: Iterable[str]) -> None:
    """Rank 0 prints the lines of all groups."""
    if world.rank == 0:
        print(*chain(*groups), sep="\n", file=sys.stderr, flush=True)


def _facts(world: World, engine: Engine, plan: Plan, schedule: Schedule) -> Iterator[str]:
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


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    """Collect the problems of a RequestError, or of a file, and go on."""
    try:
        yield
    except RequestError as error:
        problems.extend(error.problems)
    except OSError as error:
        problems.append(f"{error.filename}: {error.strerror}")
