"""The job of the question that README answers: Llama-3.1-8B on seven GPUs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from minilora.files.model_config import shape_from_config
from minilora.memory.job import MemoryJob, memory_job
from minilora.memory.zero3_gathers import Zero
from minilora.settings.settings import DataSettings, MethodSettings, Settings, TrainSettings

ROOT = Path(__file__).resolve().parent.parent.parent
# The DeepSpeed files that are shipped, by name.
FILES = {
    name: Zero.of(json.loads((ROOT / f"ds_configs/{name}.json").read_text(encoding="utf-8")))
    for name in ("zero3", "zero2", "zero0", "zero3_offload")
}


def article(rank: int = 16, **changes: Any) -> MemoryJob:
    """Rank `rank` on all layers, and 4 rows of 2048 tokens x accumulation 4 on each GPU."""
    config = (ROOT / "examples/llama-3.1-8b/config.json").read_text(encoding="utf-8")
    train = TrainSettings(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    method, data = MethodSettings(lora_rank=rank), DataSettings(cutoff_len=2048)
    settings = Settings(method=method, data=data, train=train)
    job = memory_job(settings, shape_from_config(json.loads(config)), FILES["zero3"], ranks=7)
    return replace(job, **changes)
