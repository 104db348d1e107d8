"""The DeepSpeed file: found, checked against the run's settings, its "auto" values filled in.

"auto" means what it means in the HF Trainer (transformers' integrations/deepspeed.py), so that a
file which was written for the Trainer or for LLaMA-Factory works unchanged. What becomes of every
other key stands in deepspeed_keys.py; the one "auto" that the Trainer has not stands in
second_partition.py. ZeRO-3's limits that the file does not say follow from the model's block
(zero3_limits.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minilora.files.deepspeed_keys import key_problems, what_deepspeed_gets
from minilora.files.second_partition import fit_second_partition
from minilora.files.zero3_limits import limits_from_block, limits_of_the_trainer
from minilora.model.llama_shape import LlamaShape
from minilora.settings.errors import RequestError
from minilora.settings.settings import TrainSettings
from minilora.settings.text_files import read_json

SHIPPED = resources.files("minilora") / "ds_configs"
# Keys that are checked and then left out, since the program itself sees to what they say: it
# brings AdamW and the learning rate, trains in bf16 or fp32, and accumulates gradients.
LEFT_OUT = ("data_types", "optimizer", "scheduler", "fp16", "train_batch_size")
# Values of `report_to`: DeepSpeed's section for each, and the package it needs.
MONITORS = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "comet_ml": ("comet", "comet_ml"),
}


@dataclass(frozen=True)
class Facts:
    """What "auto" values and limits follow from, apart from the settings.

    shape: of the model, as its weights are held. bf16: whether the run computes in bf16.
    machine_ranks: how many of the ranks are on this machine, None if nobody says it: then all.
    """

    world_size: int
    shape: LlamaShape
    bf16: bool
    machine_ranks: int | None = None


def find_ds_config(name: str | None) -> Path:
    """The file that the setting `deepspeed` means: a path, or the name of one shipped here.

    None means zero3. Raises RequestError naming the shipped files if there is no such file.
    """
    name = name or "zero3"
    if Path(name).is_file():
        return Path(name)
    shipped = _shipped_files()
    if name.removesuffix(".json") in shipped:
        return shipped[name.removesuffix(".json")]
    problem = f"{name}: no such file; shipped with minilora: {', '.join(shipped)}"
    raise RequestError([f"deepspeed: {problem}"])


def _shipped_files() -> dict[str, Path]:
    """The files that come with minilora, by their names without the ending, in order."""
    names = sorted(entry.name for entry in SHIPPED.iterdir() if entry.name.endswith(".json"))
    return {name.removesuffix(".json"): Path(str(SHIPPED / name)) for name in names}


def read_deepspeed_files(train: TrainSettings, facts: Facts) -> dict[str, dict[str, Any]]:
    """The DeepSpeed files that could serve a run, resolved, by their names without the ending.

    The one that the settings ask for comes first. The others are those shipped with minilora, from
    which advice is given: without those that do not fit the ranks, or that say the same as one
    before. Raises RequestError as `find_ds_config` and `resolve_ds_config` do.
    """
    asked = find_ds_config(train.deepspeed)
    files = {asked.stem: resolve_ds_config(asked, train, facts)}
    for name, path in _shipped_files().items():
        with suppress(RequestError):
            config = resolve_ds_config(path, train, facts)
            if name not in files and config not in files.values():
                files[name] = config
    return files


def zero_stage(config: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration; 0 where it says none, as in DeepSpeed."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def resolve_ds_config(path: Path, train: TrainSettings, facts: Facts) -> dict[str, Any]:
    """Read a DeepSpeed file and make of it the dictionary that DeepSpeed is given.

    Raises RequestError naming every key that is unknown, of no use, or contradicts the settings.
    """
    config = read_json(path)
    problems = [*key_problems(config), *_unusable_values(config)]
    config = what_deepspeed_gets(config)

    from_settings = _values_from_settings(train, facts)
    for key, value in {**from_settings, **limits_of_the_trainer(facts.shape)}.items():
        _replace_auto(config, key, value)
    zero = _section(config, "zero_optimization")
    if zero.get("stage") == 3:
        config["zero_optimization"] = limits_from_block(facts.shape) | dict(zero)
    problems += [
        *_contradictions(config, from_settings),
        *_foreign_scheduler(config),
        *_foreign_precision(config, facts),
        *_foreign_optimizer(config),
    ]
    if isinstance(config.get("zero_optimization"), dict):
        section = config["zero_optimization"]
        problems += fit_second_partition(section, facts.world_size, facts.machine_ranks)
    config = {key: value for key, value in config.items() if key not in LEFT_OUT}
    problems += _left_at_auto(config)
    problems = [f"{path}: {problem}" for problem in problems]
    _switch_on_monitors(config, train)
    problems += _missing_packages(config)
    if problems:
        raise RequestError(problems)

    # DeepSpeed gets one micro-step per optimizer step, because accumulation happens inside ours.
    batch_size = train.per_device_train_batch_size * train.gradient_accumulation_steps
    config["train_micro_batch_size_per_gpu"] = batch_size
    config["gradient_accumulation_steps"] = 1
    config["gradient_clipping"] = train.max_grad_norm
    config["bf16"] = {**config.get("bf16", {}), "enabled": facts.bf16}
    # The training loop reports every step already.
    config.setdefault("steps_per_print", 10**9)
    # DeepSpeed would insist on its own Adam where the optimizer's state lies in host memory; the
    # optimizer is torch's AdamW there too.
    config["zero_force_ds_cpu_optimizer"] = False
    return config


def _values_from_settings(train: TrainSettings, facts: Facts) -> dict[str, Any]:
    """What the settings say of each key that has a meaning in both; nested keys with dots."""
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


def _holder_of(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The object that a key such as bf16.enabled lies in, and the key's last part.

    Where the file has no such object, an empty one that is not part of it.
    """
    *sections, last = key.split(".")
    holder: Any = config
    for section in sections:
        holder = holder.get(section)
        if not isinstance(holder, dict):
            return {}, last
    return holder, last


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A section of the file; an empty one where the file has none, or something else there."""
    section = config.get(key)
    return section if isinstance(section, dict) else {}


def _replace_auto(config: dict[str, Any], key: str, value: Any) -> None:
    """Put the value where the file says "auto"."""
    holder, last = _holder_of(config, key)
    if holder.get(last) == "auto":
        holder[last] = value


# The checks. Each yields what is wrong with the file, a line for each problem.


def _unusable_values(config: Mapping[str, Any]) -> Iterator[str]:
    """Stages that ZeRO has not, and offloading to other places than host memory."""
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict):
        return
    for key in ("offload_param", "offload_optimizer"):
        section = zero.get(key)
        device = section.get("device") if isinstance(section, dict) else None
        if isinstance(device, str) and device not in ("cpu", "none"):
            yield f'zero_optimization.{key}.device is "{device}"; say "cpu" or "none"'
    stage = zero.get("stage", 0)
    if stage != "auto" and (type(stage) is not int or stage not in (0, 1, 2, 3)):
        yield f"zero_optimization.stage is {json.dumps(stage)}; say 0, 1, 2 or 3"


def _contradictions(config: dict[str, Any], from_settings: Mapping[str, Any]) -> Iterator[str]:
    """A value that is not "auto" must be the one that the settings say."""
    for key, value in from_settings.items():
        holder, last = _holder_of(config, key)
        found = holder.get(last)
        if found is not None and found != value:
            said = f"{json.dumps(found)}, the run's settings say {json.dumps(value)}"
            yield f'{key} is {said}; write "auto"'


def _foreign_scheduler(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("scheduler") is not None:
        yield "scheduler: remove it; lr_scheduler_type and warmup_steps say the schedule"


def _foreign_precision(config: Mapping[str, Any], facts: Facts) -> Iterator[str]:
    enabled = _section(config, "fp16").get("enabled")
    if enabled not in (None, False, "auto"):
        yield "fp16.enabled: minilora trains in bf16 or fp32; remove the fp16 section"

    # With fp32 sums beside bf16, DeepSpeed takes another optimizer, or refuses at stage 2.
    asked = _section(config, "data_types").get("grad_accum_dtype")
    own = "bf16" if facts.bf16 else "fp32"
    if asked not in (None, "auto", own):
        yield (
            f"data_types.grad_accum_dtype is {json.dumps(asked)}; gradients have the dtype of the "
            f"run, {own}: remove it"
        )


def _foreign_optimizer(config: Mapping[str, Any]) -> Iterator[str]:
    kind = _section(config, "optimizer").get("type", "AdamW")
    if kind not in ("AdamW", "Adam"):
        yield f"optimizer.type is {kind}: minilora trains with AdamW; remove the section"


def _left_at_auto(section: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Keys for which no value is known here. path: of the section, with a dot at its end."""
    for key, value in section.items():
        if value == "auto":
            yield f'{path}{key}: "auto" is not known here; give a value'
        elif isinstance(value, Mapping):
            yield from _left_at_auto(value, f"{path}{key}.")


def _switch_on_monitors(config: dict[str, Any], train: TrainSettings) -> None:
    """Enable DeepSpeed's monitors that `report_to` names; their sections may say more."""
    usual: dict[str, dict[str, Any]] = {
        "tensorboard": {"output_path": train.output_dir, "job_name": "runs"},
        "wandb": {"project": "minilora"},
    }
    for name, (section, _) in MONITORS.items():
        given = config.get(section, {})
        if name in train.report_to and isinstance(given, dict):
            config[section] = {**usual.get(name, {}), **given, "enabled": True}


def _missing_packages(config: Mapping[str, Any]) -> Iterator[str]:
    """A monitor that is enabled needs its package."""
    for name, (section, package) in MONITORS.items():
        given = config.get(section, {})
        if isinstance(given, dict) and given.get("enabled") and find_spec(package) is None:
            yield f"report_to {name} needs a package: pip install {package}"
