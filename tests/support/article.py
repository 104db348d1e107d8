"""The article's job: Llama-3.1-8B on seven GPUs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from minilora.files.model_config import shape_from_config
from minilora.memory.job import memory_job
from minilora.memory.zero3_gathers import Zero
from minilora.settings.settings import DataSettings, MethodSettings, Settings, TrainSettings

ROOT = Path(__file__).resolve().parent.parent.parent


def article(rank: int = 8, **changes: Any) -> Any:
    shape = shape_from_config(
        json.loads((ROOT / "examples/llama-3.1-8b/config.json").read_text(encoding="utf-8"))
    )
    zero = Zero.of(json.loads((ROOT / "minilora/ds_configs/zero3.json").read_text()))
    train = TrainSettings(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    method, data = MethodSettings(lora_rank=rank), DataSettings(cutoff_len=2048)
    settings = Settings(method=method, data=data, train=train)
    return replace(memory_job(settings, shape, zero, 7), **changes)
