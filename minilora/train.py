"""Train a LoRA adapter: `deepspeed --num_gpus 7 --module minilora.train CONFIG.yaml`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from minilora.arguments import read_settings
from minilora.config import RequestError, RunError, Settings, TrainSettings
from minilora.data.batches import Documents
from minilora.data.prepare import prepare
from minilora.data.schedule import Schedule
from minilora.files.adapter import CONFIG, read_adapter, read_adapter_shape
from minilora.files.weights import read_checkpoint
from minilora.model.lora import LoraShape, resolve_targets
from minilora.model.shape import LlamaShape
from minilora.run.ds_config import Facts, find_ds_config, resolve_ds_config
from minilora.run.engine import Engine, Plan, World, wants_bf16
from minilora.run.loop import Job, train
from minilora.run.report import LOG, Report

# Seconds that the other ranks leave to rank 0 for its message; the launcher ends them sooner.
LAST_WORDS = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 done, 1 the run failed, 2 the request is wrong."""
    try:
        run(read_settings(sys.argv[1:] if argv is None else argv, "train"))
    except RequestError as error:
        return _refuse(2, error.problems)
    except RunError as error:
        return _refuse(1, [str(error)])
    return 0


def run(settings: Settings) -> None:
    """Check everything, build, train, save.

    Raises RequestError before the first step, RunError for what happens in the run.
    """
    plan = check(settings)
    world = World(settings.train)
    run_in(world, settings, plan)
    world.close()


def run_in(world: World, settings: Settings, plan: Plan) -> None:
    """Train in processes that are there already. Collective."""
    options = settings.train
    documents, notes = _documents(world, settings)
    schedule = Schedule(
        documents.lengths,
        seed=options.seed,
        rows_per_step=(
            world.size * options.per_device_train_batch_size * options.gradient_accumulation_steps
        ),
        cutoff_len=settings.data.cutoff_len,
        packing=settings.packs,
        num_train_epochs=options.num_train_epochs,
        max_steps=options.max_steps,
        disable_shuffling=options.disable_shuffling,
    )
    engine = Engine(world, plan)
    if world.rank == 0:
        lines = (*settings.notices, *notes, *_facts(world, engine, plan, schedule))
        print(*lines, sep="\n", file=sys.stderr, flush=True)
    with Report(options, schedule.total_steps, active=world.rank == 0) as report:
        train(world, engine, Job(settings, documents, schedule, plan.lora), report)
        report.finish()
        report.message(f"the adapter is in {options.output_dir}")


def check(settings: Settings) -> Plan:
    """Check weights, adapter, DeepSpeed file and output folder, and report all problems at once."""
    problems: list[str] = []
    train_settings = settings.train
    checkpoint = lora = adapter = None
    assert settings.model.model_name_or_path
    with _noting(problems):
        checkpoint = read_checkpoint(Path(settings.model.model_name_or_path))
        lora, adapter = _adapter(settings, checkpoint.shape)
    with _noting(problems):
        _check_output(train_settings)
    ds_config = {}
    with _noting(problems):
        path = find_ds_config(train_settings.deepspeed)
        if checkpoint is not None:
            facts = Facts(
                world_size=int(os.environ.get("WORLD_SIZE", "1")),
                hidden_size=checkpoint.shape.hidden_size,
                bf16=wants_bf16(train_settings),
            )
            ds_config = resolve_ds_config(path, train_settings, facts)
    if problems or checkpoint is None or lora is None or adapter is None:
        raise RequestError(problems)
    recompute = not settings.model.disable_gradient_checkpointing
    return Plan(checkpoint, lora, adapter, train_settings, ds_config, recompute)


def _adapter(settings: Settings, shape: LlamaShape) -> tuple[LoraShape, Mapping[str, Tensor]]:
    """The shape of the adapter, and what it starts from if it continues another."""
    method, folder = settings.method, settings.model.adapter_name_or_path
    if folder is None:
        targets = resolve_targets(method.lora_target, list(shape.linear_shapes()))
        return LoraShape(method.lora_rank, method.alpha, method.lora_dropout, targets), {}
    lora = read_adapter_shape(Path(folder), shape, method.lora_dropout)
    return lora, read_adapter(Path(folder), lora.parameter_shapes(shape))


def _check_output(settings: TrainSettings) -> None:
    """Refuse to write over another run."""
    assert settings.output_dir
    folder = Path(settings.output_dir)
    if folder.exists() and not folder.is_dir():
        raise RequestError([f"output_dir: {folder} is a file"])
    if not settings.overwrite_output_dir and any(
        (folder / name).exists() for name in (LOG, CONFIG)
    ):
        raise RequestError(
            [f"output_dir: {folder} holds a run; name another, or set overwrite_output_dir: true"]
        )


def _documents(world: World, settings: Settings) -> tuple[Documents, list[str]]:
    """Tokenise in one process per machine; all its processes map the result into memory."""
    folder = ""
    notes: list[str] = []
    problems: list[str] = []
    if world.local_rank == 0:
        folder = tempfile.mkdtemp(prefix="minilora-")
        with _noting(problems):
            prepared = prepare(settings, colour=sys.stderr.isatty())
            prepared.documents.save(Path(folder))
            notes = [
                prepared.summary,
                "the first sample, its trained part marked:",
                prepared.sample,
            ]
    everyone = world.gather_objects((folder, notes, problems))
    folder, notes, _ = everyone[world.rank - world.local_rank]
    problems = next((found for _, _, found in everyone if found), [])
    try:
        if problems:
            raise RequestError(problems)
        return Documents.load(Path(folder)), notes
    finally:
        world.gather_objects(None)  # every process of this machine has the files open
        if world.local_rank == 0:
            shutil.rmtree(folder)


def _facts(world: World, engine: Engine, plan: Plan, schedule: Schedule) -> Iterator[str]:
    """What a user wants to see confirmed before the first step."""
    total, trained = plan.checkpoint.total_bytes, plan.lora.size(plan.checkpoint.shape)
    yield (
        f"ZeRO-{engine.stage} on {world.size} x {world.device.type}, {engine.dtype}; each process "
        f"read {engine.bytes_read / 1e9:.3f} of {total / 1e9:.3f} GB"
    )
    yield (
        f"LoRA rank {plan.lora.rank} on {', '.join(plan.lora.targets)}: {trained:,} parameters; "
        f"{schedule.total_steps} optimizer steps of {schedule.rows_per_step} rows"
    )


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    """Collect the problems of a RequestError and go on."""
    try:
        yield
    except RequestError as error:
        problems.extend(error.problems)


def _refuse(code: int, problems: Sequence[str]) -> int:
    """Rank 0 says what is wrong; the others wait, so that its exit code and words are the first."""
    if os.environ.get("RANK", "0") == "0":
        print(*(f"error: {problem}" for problem in problems), sep="\n", file=sys.stderr, flush=True)
    else:
        time.sleep(LAST_WORDS)
    return code


def leave(code: int) -> NoReturn:
    """End the process without tearing the interpreter down.

    Threads of torch that ask for the interpreter's lock while it ends abort the process (seen in
    2 of 56 processes on a busy CPU), and a finished run would count as a failed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
