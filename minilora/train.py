"""Train a LoRA adapter: `deepspeed --num_gpus 7 --module minilora.train CONFIG.yaml`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from minilora import __version__
from minilora.arguments import read_settings
from minilora.config import RequestError, RunError, Settings, TrainSettings
from minilora.data.batches import Documents
from minilora.data.prepare import prepare
from minilora.data.schedule import Schedule
from minilora.files.adapter import CONFIG, read_adapter, read_adapter_shape
from minilora.files.snapshot import State, differences, find_snapshot, read_state, read_tensors
from minilora.files.weights import fingerprint, read_checkpoint
from minilora.model.lora import LoraShape, resolve_targets
from minilora.model.shape import LlamaShape
from minilora.run.ds_config import Facts, find_ds_config, resolve_ds_config
from minilora.run.engine import MOMENTS, Engine, Plan
from minilora.run.loop import Job, train
from minilora.run.memory import is_out_of_memory, phase_of
from minilora.run.report import LOG, Report, Totals
from minilora.run.stop import Stopped
from minilora.run.world import World, wants_bf16

# Settings of training that must not change between a snapshot and the run that goes on from it.
UNCHANGING = (
    "learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "weight_decay",
    "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "seed", "disable_shuffling",
)  # fmt: skip
# Seconds that the other ranks leave to rank 0 for its message; the launcher ends them sooner.
LAST_WORDS = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 done, 1 the run failed, 2 the request is wrong, 128 + signal."""
    try:
        run(read_settings(sys.argv[1:] if argv is None else argv, "train"))
    except RequestError as error:
        return _refuse(2, error.problems)
    except RunError as error:
        return _refuse(1, [str(error)])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _out_of_memory(error)
    except Stopped as stopped:
        return _refuse(128 + stopped.number, [str(stopped)])
    return 0


def run(settings: Settings) -> None:
    """Check everything, build, train, save.

    Raises RequestError before the first step, RunError or Stopped for what happens in the run.
    """
    plan = check(settings)
    world = World(settings.train)
    run_in(world, settings, plan)
    world.close()


def run_in(world: World, settings: Settings, plan: Plan) -> None:
    """Train in processes that are there already. Collective."""
    options = settings.train
    documents, validation, notes = _documents(world, settings)
    snapshot, start = _start(settings, plan, documents)
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
        done_steps=start.step,
        done_rows=start.rows,
    )
    engine = Engine(world, plan)
    if snapshot is not None:
        engine.restore(_saved_tensors(snapshot, plan), start.step)
        notes = [f"going on from {snapshot}, step {start.step} ({start.info})", *notes]
    if world.rank == 0:
        lines = (*settings.notices, *notes, *_facts(world, engine, plan, schedule))
        print(*lines, sep="\n", file=sys.stderr, flush=True)
    info = {"ranks": world.size, "stage": engine.stage, "version": __version__}
    totals = Totals(**start.totals)
    with Report(options, schedule.total_steps, world.rank == 0, totals) as report:
        start = replace(start, info=info)
        job = Job(settings, documents, schedule, plan.lora, start, validation)
        train(world, engine, job, report)
        report.finish()
        report.message(f"the adapter is in {options.output_dir}")


def _start(settings: Settings, plan: Plan, documents: Documents) -> tuple[Path | None, State]:
    """The snapshot to go on from and where it stood; or None and the beginning."""
    same = {
        "base weights": fingerprint(plan.checkpoint),
        "data": documents.fingerprint(),
        "lora": asdict(plan.lora),
        "packing": settings.packs,
        **{key: getattr(settings.train, key) for key in UNCHANGING},
    }
    assert settings.train.output_dir
    output = Path(settings.train.output_dir)
    folder = find_snapshot(output, settings.train.resume_from_checkpoint)
    if folder is None:
        return None, State(0, 0, {}, same, {})
    state = read_state(folder)
    problems = differences(state, same, folder)
    if problems:
        raise RequestError(problems)
    return folder, state


def _saved_tensors(snapshot: Path, plan: Plan) -> dict[str, Tensor]:
    shapes = plan.lora.parameter_shapes(plan.checkpoint.shape)
    moments = {f"{name}.{moment}": size for name, size in shapes.items() for moment in MOMENTS}
    return read_tensors(snapshot, shapes | moments)


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
            [
                f"output_dir: {folder} holds a run; name another, go on with it "
                "(resume_from_checkpoint: true), or set overwrite_output_dir: true"
            ]
        )


def _documents(world: World, settings: Settings) -> tuple[Documents, Documents, list[str]]:
    """Tokenise in one process per machine; all its processes map the result into memory."""
    folder = ""
    notes: list[str] = []
    problems: list[str] = []
    if world.local_rank == 0:
        folder = tempfile.mkdtemp(prefix="minilora-")
        with _noting(problems):
            prepared = prepare(settings, colour=sys.stderr.isatty())
            prepared.documents.save(Path(folder, "train"))
            prepared.validation.save(Path(folder, "validation"))
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
        documents = Documents.load(Path(folder, "train"))
        return documents, Documents.load(Path(folder, "validation")), notes
    finally:
        world.gather_objects(None)  # every process of this machine has the files open
        if world.local_rank == 0:
            shutil.rmtree(folder)


def _facts(world: World, engine: Engine, plan: Plan, schedule: Schedule) -> Iterator[str]:
    """What a user wants to see confirmed before the first step."""
    total, trained = plan.checkpoint.total_bytes, plan.lora.size(plan.checkpoint.shape)
    yield (
        f"ZeRO-{engine.stage} on {world.size} x {world.device.type}, {engine.dtype}; each process "
        f"read {engine.bytes_read / 1e9:.4g} of {total / 1e9:.4g} GB"
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


def _out_of_memory(error: BaseException) -> int:
    """This rank says what was going on; the launcher ends the others, who wait for it."""
    rank, phase = os.environ.get("RANK", "0"), phase_of(error)
    first, *_ = str(error).splitlines() or [""]
    print(f"error: rank {rank}: out of memory in {phase}: {first}", file=sys.stderr, flush=True)
    return 1


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
