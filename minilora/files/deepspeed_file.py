"""The DeepSpeed file: found, its "auto" values filled in as the HF Trainer does, its rest kept."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minilora.settings.errors import RequestError
from minilora.settings.settings import TrainSettings
from minilora.settings.text_files import read_json

SHIPPED = resources.files("minilora") / "ds_configs"
# Sections and keys of DeepSpeed's that go with this program; DeepSpeed ignores what it does not
# know, and a misspelt zero_optimization would mean no ZeRO.
KNOWN = frozenset(
    """
    aio bf16 comet comms_logger communication_data_type csv_monitor data_types disable_allgather
    dump_state flops_profiler fp16 gradient_accumulation_steps gradient_clipping
    gradient_predivide_factor memory_breakdown optimizer prescale_gradients scheduler
    steps_per_print tensorboard train_batch_size train_micro_batch_size_per_gpu
    wall_clock_breakdown wandb zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization
    """.split()
)
# Programs of `report_to`: DeepSpeed's section for each, and the package it needs.
MONITORS = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "comet_ml": ("comet", "comet_ml"),
}


@dataclass(frozen=True)
class Facts:
    """What "auto" values are filled in from, beside the settings."""

    world_size: int
    hidden_size: int
    bf16: bool


def find_ds_config(name: str | None) -> Path:
    """The file that `deepspeed:` means: a path, or one shipped here by its name; default zero3.

    Raises RequestError naming what is shipped.
    """
    name = name or "zero3"
    shipped = sorted(entry.name for entry in SHIPPED.iterdir() if entry.name.endswith(".json"))
    if Path(name).is_file():
        return Path(name)
    for candidate in (name, f"{name}.json"):
        if candidate in shipped:
            return Path(str(SHIPPED / candidate))
    names = ", ".join(entry.removesuffix(".json") for entry in shipped)
    raise RequestError([f"deepspeed: {name}: no such file; shipped with minilora: {names}"])


def read_deepspeed_files(train: TrainSettings, facts: Facts) -> dict[str, dict[str, Any]]:
    """The DeepSpeed files that could serve a run, resolved, by name; the asked one comes first.

    The others are those shipped with minilora, for advice. Each file is opened once.
    Raises RequestError as `find_ds_config` and `resolve_ds_config` do.
    """
    asked = find_ds_config(train.deepspeed)
    shipped = [entry.name.removesuffix(".json") for entry in SHIPPED.iterdir()
               if entry.name.endswith(".json")]  # fmt: skip
    paths = {asked.stem: asked}
    paths |= {name: find_ds_config(name) for name in sorted(shipped) if name != asked.stem}
    return {name: resolve_ds_config(path, train, facts) for name, path in paths.items()}


def resolve_ds_config(path: Path, train: TrainSettings, facts: Facts) -> dict[str, Any]:
    """The dictionary that DeepSpeed is given.

    Values other than "auto" must agree with the run's settings where they say the same thing,
    as in transformers' integrations/deepspeed.py. DeepSpeed sees one micro-step per optimizer
    step: accumulation is ours. Raises RequestError naming every key that contradicts or is unknown.
    """
    config: dict[str, Any] = copy.deepcopy(read_json(path))
    problems = _form_problems(config)
    if problems:
        raise RequestError([f"{path}: {problem}" for problem in problems])
    for keys, value in _meanings(train, facts).items():
        _fill(config, keys, value, problems)
    for keys, value in _sizes(facts.hidden_size).items():
        _fill(config, keys, value, None)
    if config.pop("scheduler", None) is not None:
        problems.append("scheduler: remove it; lr_scheduler_type and warmup_steps say the schedule")
    if (config.pop("fp16", None) or {}).get("enabled") not in (None, False, "auto"):
        problems.append("fp16.enabled: minilora trains in bf16 or fp32; remove the fp16 section")
    kind = (config.pop("optimizer", None) or {}).get("type", "AdamW")
    if kind not in ("AdamW", "Adam"):
        problems.append(f"optimizer.type is {kind}: minilora trains with AdamW; remove the section")
    problems += [f'{keys}: "auto" is not known here; give a value' for keys in _autos(config)]
    problems = [f"{path}: {problem}" for problem in problems] + _add_monitors(config, train)
    if problems:
        raise RequestError(problems)
    config.pop("train_batch_size", None)
    config["train_micro_batch_size_per_gpu"] = (
        train.per_device_train_batch_size * train.gradient_accumulation_steps
    )
    config["gradient_accumulation_steps"] = 1
    config["gradient_clipping"] = train.max_grad_norm
    config["bf16"] = {**config.get("bf16", {}), "enabled": facts.bf16}
    config.setdefault("steps_per_print", 10**9)  # the loop reports; DeepSpeed need not
    # The optimizer is torch's AdamW also where its state lies in host memory.
    config["zero_force_ds_cpu_optimizer"] = False
    return config


def _form_problems(config: Mapping[str, Any]) -> list[str]:
    """Keys that DeepSpeed would ignore or this program cannot go with, and values of no use."""
    problems = []
    for key in config.keys() - KNOWN:
        close = difflib.get_close_matches(key, KNOWN, n=1, cutoff=0.8)
        hint = f"did you mean {close[0]}?" if close else "remove it"
        problems.append(f"{key} is not a key of DeepSpeed's that is used here: {hint}")
    for key in ("zero_optimization", "bf16", "fp16", "optimizer"):
        if not isinstance(config.get(key, {}), dict):
            problems.append(f"{key} is {json.dumps(config[key])}; an object {{...}} is needed")
    section = config.get("zero_optimization")
    section = section if isinstance(section, dict) else {}
    for key, part in section.items():
        if isinstance(part, dict) and part.get("device") == "nvme":
            problems.append(f'zero_optimization.{key}.device is "nvme"; say "cpu" or "none"')
    stage = section.get("stage", 0)
    if type(stage) is not int or stage not in range(4):
        problems.append(f"zero_optimization.stage is {json.dumps(stage)}; say 0, 1, 2 or 3")
    return sorted(problems)


def _add_monitors(config: dict[str, Any], train: TrainSettings) -> list[str]:
    """Switch on DeepSpeed's monitors that `report_to` names; their sections may say more.

    Returns a problem for each package that is not installed.
    """
    problems = []
    usual: dict[str, dict[str, Any]] = {
        "tensorboard": {"output_path": train.output_dir, "job_name": "runs"},
        "wandb": {"project": "minilora"},
    }
    for name, (section, package) in MONITORS.items():
        given = config.get(section, {})
        if name in train.report_to and isinstance(given, dict):
            config[section] = given = {**usual.get(name, {}), **given, "enabled": True}
        if isinstance(given, dict) and given.get("enabled") and find_spec(package) is None:
            problems.append(f"report_to {name} needs a package: pip install {package}")
    return problems


def zero_stage(config: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration, 0 where it says none."""
    stage = config.get("zero_optimization", {}).get("stage", 0)
    return int(stage)


def _meanings(train: TrainSettings, facts: Facts) -> dict[str, Any]:
    per_device = train.per_device_train_batch_size
    accumulation = train.gradient_accumulation_steps
    return {
        "train_micro_batch_size_per_gpu": per_device,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": facts.world_size * per_device * accumulation,
        "gradient_clipping": train.max_grad_norm,
        "optimizer.params.lr": train.learning_rate,
        "optimizer.params.betas": [train.adam_beta1, train.adam_beta2],
        "optimizer.params.eps": train.adam_epsilon,
        "optimizer.params.weight_decay": train.weight_decay,
        "bf16.enabled": facts.bf16,
    }


def _sizes(hidden: int) -> dict[str, int]:
    """The HF Trainer's values for "auto" sizes, in elements."""
    return {
        "zero_optimization.reduce_bucket_size": hidden * hidden,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden,
    }


def _fill(config: dict[str, Any], keys: str, value: Any, problems: list[str] | None) -> None:
    """Replace "auto" by the value; with `problems`, complain where another value stands."""
    *path, last = keys.split(".")
    node: Any = config
    for key in path:
        node = node.get(key)
        if not isinstance(node, dict):
            return
    if node.get(last) == "auto":
        node[last] = value
    elif problems is not None and node.get(last) not in (None, value):
        problems.append(
            f"{keys} is {json.dumps(node[last])}, the run's settings say {json.dumps(value)}; "
            'write "auto"'
        )


def _autos(node: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in node.items():
        if value == "auto":
            yield path + key
        elif isinstance(value, Mapping):
            yield from _autos(value, f"{path}{key}.")
