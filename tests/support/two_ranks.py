"""The jobs that run on 2 ranks in one set of processes, for the tests of partitioning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.merging import merge
from tests.support.runs import Ground, family, stage_file


def two_rank_jobs(ground: Ground) -> dict[str, dict[str, Any]]:
    """Accumulation for the traffic; recompute per stage; tiles, spans, offloading, dtypes, LoRA."""
    zero3 = str(stage_file(ground.folder, 3))
    common = {"max_steps": 3, "per_device_train_batch_size": 2, "deepspeed": zero3}
    common["keep_blocks"] = 0  # both would fit
    jobs = {}
    for accumulation in (4, 8):
        jobs[f"accumulation {accumulation}"] = {
            **common, "gradient_accumulation_steps": accumulation, "keep_weights": True
        }  # fmt: skip
    for stage in range(4):
        for keep in (False, True):
            jobs[f"stage {stage} keep {keep}"] = {
                **common,
                "deepspeed": str(stage_file(ground.folder, stage)),
                "lora_dropout": 0.2,
                "tile_tokens": 100,
                "gradient_accumulation_steps": 2,
            }
            if keep:
                del jobs[f"stage {stage} keep True"]["keep_blocks"]
                jobs[f"stage {stage} keep True"]["disable_gradient_checkpointing"] = True
    for tile, gather in ((4096, None), (1, None), (100, 100), (100, 300), (200, 10**6)):
        limits = {"tile_tokens": tile} | ({"gather_tokens": gather} if gather else {})
        jobs[f"tile {tile} gather {gather}"] = {
            **common, "gradient_accumulation_steps": 4, **limits
        }  # fmt: skip
    jobs["tile 1 gather None"] |= {"max_steps": 1, "warmup_steps": 0}  # a tile per token takes long
    jobs["offloaded"] = {**jobs["tile 100 gather 300"], "offload_activations": True}
    jobs["kept"] = {**jobs["tile 100 gather 300"], "keep_blocks": 1}
    jobs["bf16"] = {**common, "bf16": True, "keep_weights": True}
    for batch, accumulation in ((1, 8), (8, 1)):
        jobs[f"batch {batch}"] = {
            **common,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
        }
    jobs |= family(common, ground.folder)
    merged = ground.folder / "merged"
    assert merge(ground.models["tiny"], ground.adapters["tiny"], merged) == 0
    new = {"model_name_or_path": str(merged), "adapter_name_or_path": "null"}
    jobs["merged"] = {**common, **new, "gradient_accumulation_steps": 4, "tile_tokens": 4096}
    jobs = {
        name: ground.job(f"two-{name.replace(' ', '-')}", "tiny", **changes)
        for name, changes in jobs.items()
    }
    jobs["tied"] = {**jobs["accumulation 4"], "model_name_or_path": str(ground.models["tiny_tied"])}
    jobs["tied"] |= {
        "adapter_name_or_path": str(ground.adapters["tiny_tied"]),
        "output_dir": str(ground.folder / "two-tied"),
    }
    packed = {
        "model_name_or_path": str(ground.models["packable"]),
        "adapter_name_or_path": str(ground.adapters["packable"]),
        "quantization_bit": 4,
    }
    for accumulation in (4, 8):
        jobs[f"four bits {accumulation}"] = {
            **jobs[f"accumulation {accumulation}"],
            **packed,
            "output_dir": str(ground.folder / f"two-four-bits-{accumulation}"),
        }
    jobs["not packed"] = {
        **jobs["four bits 4"],
        "output_dir": str(ground.folder / "two-not-packed"),
    }
    del jobs["not packed"]["quantization_bit"]
    jobs["new four bits"] = {
        **jobs["four bits 4"],
        "adapter_name_or_path": "null",
        "output_dir": str(ground.folder / "two-new-four-bits"),
    }
    jobs["new DoRA in four bits"] = {
        **jobs["new four bits"],
        "use_dora": True,
        "additional_target": "lm_head,embed_tokens",
        "output_dir": str(ground.folder / "two-new-dora-four-bits"),
    }
    monitored = json.loads(Path(zero3).read_text(encoding="utf-8"))
    monitored["csv_monitor"] = {"enabled": True, "output_path": str(ground.folder), "job_name": "m"}
    (ground.folder / "monitored.json").write_text(json.dumps(monitored), encoding="utf-8")
    jobs["bf16"]["deepspeed"] = str(ground.folder / "monitored.json")
    return jobs
