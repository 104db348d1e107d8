"""python -m benchmarks.memory: predicted beside measured memory of one rank, phase by phase.

By default the 8B shape with random weights as one of 7 ranks on this GPU, under the memory of a
24 GB card; `--device cpu --size mid` counts the same code's tensors with torch's CPU allocator.
Collectives are torch's fake ones: shards and buffers are real, the numbers gathered are not. Under
a launcher the ranks are real. A JSON line per row, then a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.meters import (
    CpuMeter,
    GatherCount,
    GpuMeter,
    MadeUp,
    Pretended,
    held,
    peer,
    used_by_this_process,
    watch,
)
from benchmarks.workloads import SIZES, Size
from minilora.data.documents import Documents
from minilora.data.schedule import Schedule
from minilora.data.steps import Place, Step, TileLimits, build_step
from minilora.files.deepspeed_file import Facts, find_ds_config, resolve_ds_config
from minilora.files.model_config import shape_from_config
from minilora.files.weights import Checkpoint
from minilora.memory.job import MemoryJob, memory_job
from minilora.memory.measured import expand_segments
from minilora.memory.peak import CONTEXT, GIB, NCCL, peak_memory
from minilora.memory.zero3_gathers import Zero
from minilora.model.llama_shape import LlamaShape
from minilora.model.lora_shape import LoraShape
from minilora.plan import USABLE
from minilora.processes.startup_times import StartupTimes
from minilora.processes.world import World
from minilora.settings.settings import (
    DataSettings,
    MethodSettings,
    ModelSettings,
    Settings,
    TrainSettings,
)
from minilora.training.engine import ModelRecipe

BLOCK_8B = 218_103_808  # elements of a block of the model that reduce_bucket_size is made for
STEPS = 2  # DeepSpeed prefetches, and AdamW has its moments, from the second step on


@dataclass(frozen=True)
class Case:
    """A row: the article's job with changes. system: minilora, or transformers with PEFT."""

    system: str = "minilora"
    deepspeed: str = "zero3"
    tile_tokens: int = 2048
    gather_tokens: int | None = None
    loss_tokens: int = 1024
    batch: int = 4
    accumulation: int = 4
    cutoff_len: int = 2048
    lora_rank: int = 16
    lora_dropout: float = 0.0
    lora_target: tuple[str, ...] = ("all",)
    use_dora: bool = False
    additional_target: tuple[str, ...] | None = None
    keep_blocks: int = 0
    offload_activations: bool = False
    tied: bool = False
    packing: bool = False
    model_type: str = "llama"
    reduce_bucket_size: int | None = None
    machine_ranks: int | None = None
    quantization_bit: int | None = None
    bf16: bool = True
    prefetch: bool = True

    @property
    def name(self) -> str:
        values = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        changed = [
            f"{k}={v}" for k, (v, usual) in values.items() if v != usual and k != "deepspeed"
        ]
        return " ".join([self.deepspeed, *changed])

    def settings(self) -> Settings:
        return Settings(
            ModelSettings("made up", quantization_bit=self.quantization_bit),
            MethodSettings(
                lora_rank=self.lora_rank,
                lora_dropout=self.lora_dropout,
                lora_target=tuple(self.lora_target),
                use_dora=self.use_dora,
                additional_target=self.additional_target and tuple(self.additional_target),
            ),
            DataSettings(cutoff_len=self.cutoff_len, packing=self.packing),
            TrainSettings(
                per_device_train_batch_size=self.batch,
                gradient_accumulation_steps=self.accumulation,
                tile_tokens=self.tile_tokens,
                gather_tokens=self.gather_tokens,
                loss_tokens=self.loss_tokens,
                offload_activations=self.offload_activations,
                keep_blocks=self.keep_blocks,
                bf16=self.bf16,
            ),
        )


def sweep(size: str, bf16: bool) -> list[Case]:
    """The article's job for each file, and one thing changed at a time; then the peer.

    A small model gets a sixteenth of the tokens.
    """
    few, cases = 1 if size == "8b" else 16, []
    for file in ("zero3", "zero2", "zero0"):
        base = Case(deepspeed=file, bf16=bf16, cutoff_len=2048 // few, loss_tokens=1024 // few)
        base = dataclasses.replace(base, tile_tokens=2048 // few, lora_rank=SIZES[size].rank)
        near = dataclasses.replace(base, gather_tokens=8192 // few)
        cases += [base, near, dataclasses.replace(base, gather_tokens=16384 // few)]
        cases += [dataclasses.replace(near, tile_tokens=n // few) for n in (4096, 8192)]
        cases += [dataclasses.replace(base, offload_activations=True)]
        cases += [dataclasses.replace(base, batch=n) for n in (1, 2, 8)]
        if file == "zero3":
            cases += [dataclasses.replace(base, loss_tokens=n // few) for n in (256, 4096)]
    other = dataclasses.replace(base, system="peer", deepspeed="none")
    return [*cases, *(dataclasses.replace(other, batch=n) for n in (1, 2, 4))]


def packed(size: str, on_gpu: bool) -> list[Case]:
    """What 4 bits are for: all blocks kept in 24 GB and nothing gathered; and ZeRO-3 in spans."""
    few, base = 1 if size == "8b" else 16, sweep(size, on_gpu)[0]
    bits = dataclasses.replace(base, quantization_bit=4)
    whole = {"deepspeed": "zero0", "gather_tokens": 2048 // few}
    return [
        dataclasses.replace(bits, keep_blocks=SIZES[size].layers, **whole),
        dataclasses.replace(bits, gather_tokens=8192 // few),
    ]


def measure(case: Case, size: Size, world: World) -> dict[str, Any]:
    """Run the case for its steps; peaks of the last one, by phase, and bytes of what stays."""
    gc.collect()  # what an earlier row left must not be released within this one
    meter = GpuMeter() if world.device.type == "cuda" else CpuMeter()
    if case.system == "peer":
        step: Callable[[], None] = _peer_stepper(case, size, world.device)
        engine = None
    else:
        engine = _engine(case, size, world)
        step = _stepper(case, engine, meter)
    for _ in range(STEPS - 1):
        with meter.window("start"):
            step()
    meter.forget()
    with meter.window("run"):
        step()
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        meter.notes["retries"] = torch.cuda.memory_stats().get("num_alloc_retries", 0)
        meter.notes |= {"used": used_by_this_process(), "device used": total - free}
    return meter.close() | meter.notes | (held(engine) if engine else {})


def _engine(case: Case, size: Size, world: World) -> MadeUp:
    settings, shape = case.settings(), _shape(case, size)
    plan = ModelRecipe(
        checkpoint=Checkpoint(Path("made up"), shape, {}),
        lora=LoraShape.of(settings.method, shape),
        adapter={},
        train=settings.train,
        ds_config=_ds_config(case, size, world.size),
        keep_blocks=case.keep_blocks,
        tile_tokens=case.tile_tokens,
    )
    return MadeUp(world, plan, StartupTimes())


def _stepper(case: Case, engine: MadeUp, meter: GpuMeter | CpuMeter) -> Callable[[], None]:
    """A function that takes an optimizer step, its phases in windows."""
    count, batch = GatherCount(), _batch(case, engine.world)

    def step() -> None:
        gathered = count.bytes
        for number, span in enumerate(batch.spans, 1):
            engine.forward_backward(span, 1.0, last=number == len(batch.spans))
        meter.notes["gathered"] = count.bytes - gathered
        engine.step(1e-4)

    watch(engine.model.model, "forward", meter, "forward")
    watch(engine.model.lm_head, "forward", meter, "loss")
    watch(engine.engine, "backward", meter, "recompute")
    watch(engine, "step", meter, "step")
    return step


def _peer_stepper(case: Case, size: Size, device: torch.device) -> Callable[[], None]:
    """transformers and PEFT, each block checkpointed, a micro-batch at a time."""
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    model, adam = peer(size.config(), case.lora_rank, device, dtype)

    def step() -> None:
        ids = torch.randint(size.vocab, (case.batch, case.cutoff_len), device=device)
        for _ in range(case.accumulation):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        adam.step()
        adam.zero_grad()

    return step


def _batch(case: Case, world: World) -> Step:
    """The step's documents: all of the greatest length, or packed, of many."""
    rows = case.batch * case.accumulation * world.size
    lengths = np.full(rows, case.cutoff_len)
    if case.packing:
        source = np.random.Generator(np.random.PCG64(5))
        lengths = source.integers(case.cutoff_len // 16, case.cutoff_len // 4, 16 * rows)
    encoded = [(np.arange(n, dtype=np.int32) % 256, np.ones(n, dtype=np.bool_)) for n in lengths]
    schedule = Schedule(lengths, 1, rows, case.cutoff_len, case.packing)
    place = Place(world.rank, world.size)
    limits = TileLimits(case.tile_tokens, case.gather_tokens)
    chosen = schedule.document_ids(0)
    return build_step(Documents.of(encoded), chosen, 0, schedule, place, limits)


def predict(case: Case, size: Size, ranks: int, on_gpu: bool) -> dict[str, Any]:
    """What the plan says: the same keys as `measure` where it counts the same."""
    peak = peak_memory(_memory_job(case, size, ranks, on_gpu))
    moments = dict(peak.by_moment)
    if case.offload_activations and not on_gpu:  # what is away is counted with the rest
        inputs = next(t.bytes for t in peak.host if t.name.startswith("block inputs")) // ranks
        for moment in ("forward", "loss", "recompute"):
            away = size.layers - case.keep_blocks
            moments[moment] += inputs * (away - (moment == "recompute")) // away
    found = {"run": max(moments.values()), "total": peak.total, "gathered": peak.gathered}
    found |= moments
    for term in peak.terms:
        for name in ("weights", "LoRA", "Adam moments"):
            if term.name.startswith(f"{name},") and "gradients" not in term.name:
                found[name] = found.get(name, 0) + term.bytes * ("master" not in term.name)
    return found


def _memory_job(case: Case, size: Size, ranks: int, on_gpu: bool) -> MemoryJob:
    zero = Zero.of(_ds_config(case, size, ranks))
    job = memory_job(case.settings(), _shape(case, size), zero, ranks)
    return dataclasses.replace(job, on_gpu=on_gpu)


def _shape(case: Case, size: Size) -> LlamaShape:
    config = size.config() | {"tie_word_embeddings": case.tied, "model_type": case.model_type}
    shape = shape_from_config(config | {"head_dim": size.hidden // size.heads})
    return shape.in_bits(case.quantization_bit)


def _ds_config(case: Case, size: Size, ranks: int) -> dict[str, Any]:
    """The shipped file; its bucket for gradients is as large beside a block as at 8B."""
    facts = Facts(ranks, _shape(case, size), case.bf16, case.machine_ranks)
    config = resolve_ds_config(find_ds_config(case.deepspeed), case.settings().train, facts)
    section = config["zero_optimization"]
    if "reduce_bucket_size" in section:
        section["reduce_bucket_size"] = section["reduce_bucket_size"] * size.block // BLOCK_8B
    if not case.prefetch:
        section["stage3_prefetch_bucket_size"] = 0
    if case.reduce_bucket_size:
        section["reduce_bucket_size"] = case.reduce_bucket_size
    return config


def row(case: Case, own: argparse.Namespace, world: World) -> dict[str, Any]:
    """Measure and predict; running out of memory is a result too."""
    size, on_gpu = SIZES[own.size], own.device == "cuda"
    result: dict[str, Any] = {
        "case": case.name,
        "size": own.size,
        "ranks": world.size,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }
    if case.system == "minilora":
        result["predicted"] = predict(case, size, world.size, on_gpu)
    try:
        result["measured"] = measure(case, size, world)
    except torch.OutOfMemoryError:
        result["measured"] = {}
    return result


def shown(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of a table, in MiB: tensors, then all of a GPU, and what torch reserved of it.

    in use: of this process by the driver, or else of the device, which others may share.
    """
    width = max(len(found["case"]) for found in rows)
    yield (
        f"{'MiB':<{width}}{'predicted':>11}{'measured':>11}{'':>8}"
        f"{'all':>11}{'reserved':>11}{'in use':>11}"
    )
    for found in rows:
        plan, real = found.get("predicted", {}), found["measured"]
        predicted, measured = plan.get("run"), real.get("run")
        both = f"{predicted / measured - 1:+.1%}" if predicted and measured else ""
        in_use = real.get("used") or real.get("device used")
        shown = (predicted, measured, plan.get("total"), real.get("reserved"), in_use)
        cells = [f"{n / 2**20:,.1f}" if n else "-" for n in shown]
        full = "" if measured else "  out of memory"
        yield (
            f"{found['case']:<{width}}{cells[0]:>11}{cells[1]:>11}{both:>8}"
            f"{cells[2]:>11}{cells[3]:>11}{cells[4]:>11}{full}"
        )


def alone(command: Sequence[str]) -> dict[str, Any]:
    """The row that a process of its own measures, so that no memory of another is left."""
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="8b", choices=tuple(SIZES))
    parser.add_argument("--ranks", type=int, default=7)
    parser.add_argument("--cap", type=float, default=24, help="GB of the card; 0 for all there is")
    parser.add_argument("--cases", help="a JSON list of changes to the job, instead of the sweep")
    parser.add_argument("--only", type=int, help="the row of this number, without the table")
    parser.add_argument("--out", type=Path, help="append the JSON lines here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    own = read(argv)
    cases = (
        [
            Case(**{k: tuple(v) if k == "lora_target" else v for k, v in fields.items()})
            for fields in json.loads(own.cases)
        ]
        if own.cases
        else sweep(own.size, own.device == "cuda")
    )
    if own.device == "cuda" and own.only is None:
        again = [sys.executable, "-m", "benchmarks.memory", *(argv or sys.argv[1:]), "--only"]
        rows = [alone([*again, str(number)]) for number in range(len(cases))]
    else:
        expand_segments()
        if own.device == "cuda" and own.cap:
            total = torch.cuda.get_device_properties(0).total_memory
            left = own.cap * USABLE * GIB - CONTEXT - NCCL  # only torch's allocator is capped
            torch.cuda.set_per_process_memory_fraction(min(1.0, left / total))
        real = int(os.environ.get("WORLD_SIZE", "1")) > 1
        world = World(TrainSettings()) if real else Pretended(own.ranks, own.device)
        if isinstance(world, World):
            world.open_device(TrainSettings())
        chosen = cases if own.only is None else cases[own.only : own.only + 1]
        rows = [row(case, own, world) for case in chosen]
        if world.rank:
            return 0
    lines = [json.dumps(found) for found in rows]
    print(*lines, sep="\n")
    if own.out:
        with own.out.open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
    if own.only is None:
        print(*shown(rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
