"""The job of the question that README answers: Llama-3.1-8B on seven GPUs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from minilora.files.deepspeed_file import Facts, read_deepspeed_files
from minilora.files.model_config import shape_from_config
from minilora.memory.job import MemoryJob, memory_job
from minilora.memory.zero3_gathers import Zero
from minilora.model.llama_shape import LlamaShape
from minilora.settings.settings import DataSettings, MethodSettings, Settings, TrainSettings

ROOT = Path(__file__).resolve().parent.parent.parent
TRAIN = TrainSettings(per_device_train_batch_size=4, gradient_accumulation_steps=4)


def example_shape(name: str, quantization_bit: int | None = None) -> LlamaShape:
    """The model of a folder of examples/."""
    config = (ROOT / f"examples/{name}/config.json").read_text(encoding="utf-8")
    return shape_from_config(json.loads(config)).in_bits(quantization_bit)


def files_for(shape: LlamaShape) -> dict[str, Zero]:
    """The DeepSpeed files that are shipped, by name, with the limits that follow from a model."""
    configs = read_deepspeed_files(TRAIN, Facts(7, shape, bf16=True))
    return {name: Zero.of(config) for name, config in configs.items()}


FILES = files_for(example_shape("llama-3.1-8b"))


def article(
    rank: int = 16,
    model: str = "llama-3.1-8b",
    quantization_bit: int | None = None,
    **changes: Any,
) -> MemoryJob:
    """Rank `rank` on all layers, and 4 rows of 2048 tokens x accumulation 4 on each GPU."""
    shape = example_shape(model, quantization_bit)
    method, data = MethodSettings(lora_rank=rank), DataSettings(cutoff_len=2048)
    settings = Settings(method=method, data=data, train=TRAIN)
    return replace(memory_job(settings, shape, files_for(shape)["zero3"], ranks=7), **changes)
