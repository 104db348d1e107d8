"""What tests of whole runs share: what runs start from, how they start, what they leave."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from minilora.data.tokenizer_files import read_tokenizer_files
from minilora.files.adapter import WEIGHTS, write_adapter
from minilora.files.model_config import read_model_config
from minilora.files.weights import read_checkpoint
from minilora.model.llama_shape import LlamaShape
from minilora.model.lora_shape import LoraShape
from minilora.model.nf4 import pack

STEPS = 8
RANK, ALPHA, RATE, DECAY = 4, 8, 2e-4, 0.1
CUTOFF = 96
# Start adapters beside the plain ones: fields of LoraShape.
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {
        "targets": r"model\.layers\.(0\..*|1\.mlp\.\w+|1.*[qk])_proj",
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {"k_proj": 3, r"layers\.0\..*down_proj": 20},
    },
    "whole": {"modules_to_save": ("embed_tokens", "lm_head")},
}


@dataclass(frozen=True)
class Ground:
    """What all runs start from: checkpoints, their start adapters, one dataset."""

    models: dict[str, Path]
    adapters: dict[str, Path]
    data: Path
    folder: Path

    def job(self, name: str, model: str, **changes: Any) -> dict[str, Any]:
        """Settings of a run, flat."""
        return {
            "model_name_or_path": str(self.models[model]),
            "adapter_name_or_path": str(self.adapters[model]),
            "dataset": str(self.data),
            "output_dir": str(self.folder / name),
            "overwrite_output_dir": True,
            "cutoff_len": CUTOFF,
            "max_steps": STEPS,
            "learning_rate": RATE,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "weight_decay": DECAY,
            "max_grad_norm": 0.5,
            "logging_steps": 1,
            "plot_loss": False,
            **changes,
        }


def write_rows(path: Path, count: int) -> None:
    """Ragged conversations: system prompts, several turns, other scripts, over-long ones."""
    words = ["ship", "r\u00e9sum\u00e9", "\u4f60\u597d", "loss 0.5", "\U0001f600 ok", "<|eot_id|>"]
    rows = []
    for index in range(count):
        turns = [] if index % 3 else [{"role": "system", "content": f"Be brief, {index}."}]
        for turn in range(1 + index % 2):
            text = " ".join(words[(index + k) % len(words)] for k in range(1 + (7 * index) % 19))
            turns.append({"role": "user", "content": f"{text}? {turn}"})
            turns.append({"role": "assistant", "content": f"{words[(index + turn) % 5]} {index}"})
        rows.append({"messages": turns})
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def run_jobs(
    launch: Callable[..., tuple[int, str]],
    ranks: int,
    jobs: list[dict[str, Any]],
    machines: int = 1,
) -> str:
    """Run the jobs in one set of processes, so many ranks on each machine; returns their output."""
    listed = Path(jobs[0]["output_dir"]).parent / f"jobs-{ranks}-{len(jobs)}.json"
    listed.write_text(json.dumps(jobs), encoding="utf-8")
    code, output = launch(
        ranks, ["-m", "tests.support.jobs", listed], with_="forked", machines=machines
    )
    assert code == 0, output
    return output


def log(job: dict[str, Any], key: str) -> list[float]:
    lines = (Path(job["output_dir"]) / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)[key] for line in lines]


def adapter(job: dict[str, Any]) -> dict[str, Tensor]:
    return load_file(Path(job["output_dir"]) / WEIGHTS)


def costs(job: dict[str, Any]) -> list[dict[str, Any]]:
    text = (Path(job["output_dir"]) / "costs.json").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(text)
    return found


def base_weights(model: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def check_loading(job: dict[str, Any], ranks: int, stage: int = 3) -> None:
    """Gathered weights are the files' to the bit; no rank read more than its share + 1 %.

    Packed ones are to the bit what the files' become when they are packed. There a rank reads, of
    each matrix, up to two rows more than its share, and each cut makes all read one row more.
    """
    model = Path(job["model_name_or_path"])
    held, written = load_file(Path(job["output_dir"]) / "whole"), base_weights(model)
    assert held.keys() == written.keys()
    rows = 0  # bytes of one row of each packed matrix
    for name, tensor in written.items():
        packed = "quantization_bit" in job and name.endswith("_proj.weight")
        expected = pack(tensor) if packed else tensor.to(held[name].dtype)
        assert torch.equal(held[name], expected), name
        rows += tensor[0].nbytes * packed

    total = read_checkpoint(read_model_config(model)).total_bytes
    parts = ranks if stage == 3 else 1
    read = [cost["bytes_read"] for cost in costs(job)]
    assert len(read) == ranks and min(read) > 0
    assert max(read) <= 1.01 * total / parts + 2 * rows * (parts > 1)
    assert total <= sum(read) * parts / ranks <= total + (parts - 1) * rows


def check_output(output: str, *told: str) -> None:
    """A run said these words, and once each what it loads, plans, takes and leaves."""
    for words in told:
        assert words in output, output
    assert re.search(r"s since the launch: imports \d+\.\d, checks .*, weights ", output)
    assert output.count("the adapter is in") == 1
    assert output.count("\nplan: ") == output.count("memory at the peak: predicted ") == 1


def stage_file(folder: Path, stage: int) -> Path:
    """A DeepSpeed file whose limits bind at the tiny model's size: about one block is held."""
    path = folder / f"stage{stage}.json"
    section: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 5000}
    if stage == 3:
        section |= {
            "stage3_param_persistence_threshold": 600,
            "stage3_prefetch_bucket_size": 10_000,
            "stage3_max_live_parameters": 12_000,
            "stage3_max_reuse_distance": 12_000,
        }
    path.write_text(json.dumps({"zero_optimization": section, "gradient_clipping": "auto"}))
    return path


def make_ground(folder: Path, models: dict[str, Path]) -> Ground:
    """Rows and start adapters for these checkpoints."""
    write_rows(folder / "rows.jsonl", 75)
    adapters = {}
    generator = torch.Generator().manual_seed(9)
    plain = [(name, name, {}) for name in models]
    family = [(name, "tiny", fields) for name, fields in VARIANTS.items() if "tiny" in models]
    packed = [("packable_dora", "packable", VARIANTS["dora"])] if "packable" in models else []
    # The order says which random numbers each adapter gets.
    for name, model, fields in (*plain[:2], *family, *plain[2:], *packed):
        shape = read_model_config(models[model]).shape
        lora = variant_shape(shape, fields)
        tensors = {
            parameter: torch.randn(size, generator=generator) * 0.1 + (len(size) == 1)
            for parameter, size in lora.parameter_shapes(shape).items()
        }
        adapters[name] = folder / f"start-{name}"
        write_adapter(adapters[name], tensors, lora, read_tokenizer_files(models[model]))
    return Ground(models, adapters, folder / "rows.jsonl", folder)


def variant_shape(shape: LlamaShape, fields: dict[str, Any]) -> LoraShape:
    """The adapter of the runs, and what a variant changes of it."""
    usual = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "targets": tuple(shape.linear_shapes())}
    return LoraShape(**{**usual, **fields})


def family(common: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """New adapters: plain, and all of the LoRA family at once at several stages, in spans."""
    new = {**common, "adapter_name_or_path": "null", "gradient_accumulation_steps": 4}
    jobs = {"new": new}
    every = {
        "use_dora": True,
        "use_rslora": True,
        "loraplus_lr_ratio": 4,
        "rank_pattern": '{"v_proj": 3}',
        "additional_target": "lm_head,embed_tokens",
        "lora_dropout": 0.2,
        "tile_tokens": 100,
        "gather_tokens": 300,
        "loss_tokens": 16,
    }
    for stage, bf16 in [
        (0, False),
        (1, False),
        (2, False),
        (3, False),
        (0, True),
        (2, True),
        (3, True),
    ]:
        stage_json = str(stage_file(folder, stage))
        jobs[f"family {stage} {bf16}"] = {**new, **every, "bf16": bf16, "deepspeed": stage_json}
    one_tile = {**every, "tile_tokens": 4096, "gather_tokens": 10**6}
    for keep in (False, True):
        jobs[f"family keep {keep}"] = {**new, **one_tile, "keep_blocks": 2 * keep}
    return jobs
