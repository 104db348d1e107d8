"""minilora as `minilora.train` runs it, but for its weights, which are made up by name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.meters import Pretended, held
from benchmarks.turns import Turns
from benchmarks.workloads import LLAMA_FACTORY, SIZES, Size, rows, weight
from minilora.data.documents import Documents
from minilora.data.schedule import Schedule
from minilora.data.steps import TileLimits
from minilora.data.tokenizer_files import TokenizerFiles
from minilora.files.deepspeed_file import Facts, find_ds_config, resolve_ds_config
from minilora.files.snapshot import State
from minilora.files.tensor_parts import TensorPart
from minilora.files.weights import Checkpoint
from minilora.memory.in_a_run import foresee
from minilora.memory.job import memory_job
from minilora.memory.spare import Open
from minilora.memory.ways import Way
from minilora.memory.zero3_gathers import Zero
from minilora.model.nf4 import pack
from minilora.processes.startup_times import StartupTimes
from minilora.processes.world import World
from minilora.report.run_log import Report, StepRecord
from minilora.settings.settings import (
    DataSettings,
    MethodSettings,
    ModelSettings,
    Settings,
    TrainSettings,
)
from minilora.training import engine as engine_module
from minilora.training.engine import Engine, ModelRecipe
from minilora.training.job import Job
from minilora.training.loop import train


class Watch(Report):
    """A report that hands over to the turns after each step."""

    def __init__(self, turns: Turns, engine: Engine, *args: Any) -> None:
        super().__init__(*args)
        self.turns, self.engine = turns, engine

    def step(self, record: StepRecord) -> None:
        super().step(record)
        self.turns.counted["tokens"] = record.tokens
        self.turns.step_done(record.loss, self._gradients)

    def _gradients(self) -> dict[str, Tensor]:
        """AdamW's first moment after one step is the clipped gradient times 1 - beta1."""
        scale = 1 - self.engine.adam.defaults["betas"][0]
        return {
            name.removesuffix(".exp_avg"): tensor / scale
            for name, tensor in self.engine.moments()
            if name.endswith(".exp_avg")
        }


def run(turns: Turns) -> None:
    """Train until the turns are over."""
    variant, size = turns.order.variant, SIZES[turns.order.size]
    settings = _settings(turns, size)
    engine_module.read_parts = fill  # type: ignore[assignment]
    if variant.simulated:  # there is nobody to meet
        world: World = Pretended(variant.simulated, turns.order.device)
    else:
        world = World(settings.train)
    world.open_device(settings.train)
    turns.mark("processes")
    plan, options = _plan(turns, size, settings), settings.train
    per_step = world.size * options.per_device_train_batch_size
    per_step *= options.gradient_accumulation_steps
    count = 16 * 64 if variant.packing else per_step * turns.order.steps
    documents = Documents.of(rows(size, variant.workload, count))
    schedule = Schedule(
        documents.lengths,
        seed=options.seed,
        rows_per_step=per_step,
        cutoff_len=size.cutoff,
        packing=variant.packing,
        break_even_length=size.shape.break_even_length,
        max_steps=turns.order.steps + 1,  # the turns end the run before its last step
        disable_shuffling=True,
    )
    memory = memory_job(settings, plan.checkpoint.shape, Zero.of(plan.ds_config), world.size)
    bf16 = settings.train.computes_in_bf16(torch.cuda.is_available())
    asked = Way(variant.name, replace(memory, bf16=bf16))
    forecast = foresee(world, asked, {}, plan.lora, schedule, Open.of(settings))
    decided = forecast.decided.job
    plan = replace(plan, keep_blocks=decided.keep_blocks, tile_tokens=decided.tile_tokens)
    turns.counted |= {"kept": decided.keep_blocks, "tile": decided.tile_tokens}
    phases = StartupTimes()
    phases.finished = turns.mark  # type: ignore[method-assign]
    engine = Engine(world, plan, phases)
    turns.counted["held"] = held(engine)["weights"]
    with Watch(turns, engine, options, schedule.total_steps, world.rank == 0) as log:
        job = Job(
            world=world,
            engine=engine,
            settings=settings,
            documents=documents,
            validation=None,
            schedule=schedule,
            limits=TileLimits(decided.tile_tokens, decided.gather_tokens),
            lora=plan.lora,
            base=TokenizerFiles(settings.base, {}),
            start=State(0, 0, {}, {}, {}),
            log=log,
        )
        train(job)


def _settings(turns: Turns, size: Size) -> Settings:
    variant = turns.order.variant
    return Settings(
        ModelSettings("made up", quantization_bit=variant.bits),
        MethodSettings(lora_rank=size.rank),
        DataSettings(("made up",), cutoff_len=size.cutoff, packing=variant.packing),
        TrainSettings(
            output_dir=f"{turns.order.folder}/{variant.name}",
            per_device_train_batch_size=1 if variant.packing else size.per_device,
            gradient_accumulation_steps=1 if variant.packing else size.accumulation,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            logging_steps=10**6,
            save_strategy="no",
            disable_shuffling=True,
            tile_tokens=variant.tile_tokens,
            gather_tokens=variant.gather_tokens,
            keep_blocks=None if variant.keep is None else round(variant.keep * size.layers),
        ),
    )


def _plan(turns: Turns, size: Size, settings: Settings) -> ModelRecipe:
    variant = turns.order.variant
    shape = size.shape.in_bits(variant.bits)
    facts = Facts(variant.world, shape, settings.train.computes_in_bf16(torch.cuda.is_available()))
    path = _ds_file(turns, size)
    like = _like(turns)
    adapter = {
        name: weight(name, parameter, like)
        for name, parameter in size.lora.parameter_shapes(shape).items()
    }
    return ModelRecipe(
        checkpoint=Checkpoint(Path("made up"), shape, {}),
        lora=size.lora,
        adapter=adapter,
        train=settings.train,
        ds_config=resolve_ds_config(path, settings.train, facts),
        keep_blocks=settings.train.keep_blocks or 0,
        tile_tokens=settings.train.least_tile_tokens,
    )


def _ds_file(turns: Turns, size: Size) -> Path:
    """Ours for the stage, for a small model with limits of its own.

    Every LoRA matrix stays whole on each rank, every frozen one is partitioned, and a block is
    fetched ahead, as at 8B.
    """
    if turns.order.variant.file == "llama_factory":
        config: dict[str, Any] = LLAMA_FACTORY
    else:
        path = find_ds_config(f"zero{turns.order.variant.stage}")
        config = json.loads(path.read_text(encoding="utf-8"))
        if turns.order.variant.stage == 3 and turns.order.size != "8b":
            matrices = size.shape.in_bits(turns.order.variant.bits).held_matrices().values()
            config["zero_optimization"] |= {
                "stage3_param_persistence_threshold": min(matrices) - 1,
                "stage3_prefetch_bucket_size": sum(matrices),
                "stage3_max_live_parameters": 5 * sum(matrices),
                "stage3_max_reuse_distance": sum(matrices),
            }
    made = Path(turns.order.folder) / f"{turns.order.variant.name}-ds-{turns.rank}.json"
    made.write_text(json.dumps(config), encoding="utf-8")
    return made


def _like(turns: Turns) -> Tensor:
    import torch

    return torch.empty(0, device=turns.order.device)


def fill(checkpoint: Checkpoint, pieces: Iterable[TensorPart], digest: object = None) -> int:
    """Take the place of read_pieces: each destination gets its part of the weight of that name."""
    shapes = checkpoint.shape.parameter_shapes()
    total = 0
    for piece in pieces:
        # Beside packed weights the others are those of files in bf16, as the peer reads them.
        like = piece.destination[:0]
        like = like.to(torch.bfloat16) if checkpoint.shape.packed else like
        numbers = weight(piece.name, shapes[piece.name], like)
        numbers = (pack(numbers) if piece.packed else numbers).view(-1)
        piece.destination.copy_(numbers[piece.start : piece.start + len(piece.destination)])
        total += piece.destination.nbytes
    return total
