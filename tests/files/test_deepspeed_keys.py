"""Every key that DeepSpeed reads has a fate here, and keys that would go wrong are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

from minilora.files.deepspeed_file import Facts, resolve_ds_config
from minilora.files.deepspeed_keys import (
    HANDED_ON,
    KINDS,
    NO_MEANING,
    REFUSED,
    known_keys,
    sections,
)
from minilora.settings.errors import RequestError
from minilora.settings.settings import TrainSettings
from tests.support.article import example_shape

FACTS = Facts(1, example_shape("llama-3.1-8b"), bf16=True)
# DeepSpeed's class for each section that has one.
CLASSES: dict[str, Any] = {
    "bf16": DeepSpeedBF16Config,
    "comet": CometConfig,
    "comms_logger": CommsLoggerConfig,
    "csv_monitor": CSVConfig,
    "fp16": DeepSpeedFP16Config,
    "tensorboard": TensorBoardConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
    "wandb": WandbConfig,
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
}
# Sections that DeepSpeed reads key by key, without a class.
READ_BY_KEY = ("activation_checkpointing", "aio", "checkpoint", "data_types", "flops_profiler",
               "scheduler")  # fmt: skip
SAMPLES: dict[str, Any] = {
    "flag": True, "count": 7, "number": 7, "text": "cpu", "list": [], "section": {}, "any": 2,
}  # fmt: skip


class Recorder(dict[str, Any]):
    """A section that notes which of its keys are asked for."""

    def __init__(self, asked: set[tuple[str, str]], section: str = "", **values: Any) -> None:
        super().__init__(**values)
        self.asked, self.section = asked, section

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add((self.section, key))
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add((self.section, str(key)))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add((self.section, key))
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> Recorder:
        return self


def resolve(tmp_path: Path, config: Any) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return resolve_ds_config(path, TrainSettings(), FACTS)


def problems(tmp_path: Path, config: Any) -> list[str]:
    with pytest.raises(RequestError) as refused:
        resolve(tmp_path, config)
    return [problem.removeprefix(f"{tmp_path}/ds.json: ") for problem in refused.value.problems]


def test_every_key_that_deepspeed_reads_has_a_fate() -> None:
    """A key that a new release brings shows here, and needs a line in one of the tables."""
    for section, declaration in CLASSES.items():
        fields = declaration.model_fields.items()
        names = {name for name, _ in fields} | {field.alias for _, field in fields if field.alias}
        # An alias's plain name is listed where somebody could write it.
        assert not names - known_keys(section).keys() - {field.alias for _, field in fields}, (
            section
        )

    asked: set[tuple[str, str]] = set()
    read = {name: Recorder(asked, name) for name in READ_BY_KEY}
    read["scheduler"] |= {"type": "WarmupLR", "params": {}}
    adam = Recorder(asked, "optimizer", type="Adam", params=Recorder(asked, "optimizer.params"))
    DeepSpeedConfig(
        Recorder(asked, train_micro_batch_size_per_gpu=1, optimizer=adam, **read),
    )
    assert len({key for section, key in asked if not section}) > 50
    strangers = {(section, key) for section, key in asked if key not in known_keys(section)}
    assert not strangers


def test_no_key_has_two_fates_and_kinds_are_deepspeeds() -> None:
    for section in sections():
        tables = [
            *(names.split() for names in HANDED_ON.get(section, {}).values()),
            NO_MEANING.get(section, "").split(),
            *(names.split() for names, _, _ in REFUSED.get(section, ())),
        ]
        assert len(set().union(*tables)) == sum(len(table) for table in tables), section
    for section, declaration in CLASSES.items():
        for key, kind in known_keys(section).items():
            if kind in KINDS and key not in ("stage3_max_live_parameters", "device"):
                declaration(**{key: SAMPLES[kind]})


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"mics_shard_size": 4}, "no MiCS any more"),
        ({"mics_hierarchical_params_gather": True}, "no such feature"),
        ({"zero_quantized_weights": True}, "in the dtype of the run"),
        ({"zero_quantized_nontrainable_weights": True}, "in the dtype of the run"),
        ({"zero_quantized_gradients": True}, "as they are"),
        ({"zenflow": {"topk_ratio": 0.1}}, "trains without it"),
        ({"compute_grad_norm": False}, "the norm"),
        ({"leaf_module": {"names": ["mlp"]}}, "the decoder blocks"),
        ({"stage3_module_granularity_threshold": 5000}, "the decoder blocks"),
        ({"cpu_offload_param": True}, '"offload_param": {"device": "cpu"}'),
        ({"prefetch_bucket_size": 5}, "write stage3_"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "in one place"),
        ({"offload_param": {"device": "nvme"}}, 'say "cpu" or "none"'),
        ({"overlap_com": True}, "did you mean overlap_comm?"),
        ({"offload_params": {"device": "cpu"}}, "did you mean offload_param?"),
        ({"offload_param": {"devise": "cpu"}}, "did you mean device?"),
        ({"loss_scale": 0}, "remove it"),
        ({"check_grad_overflow": True}, "it belongs to bf16"),
        ({"reduce_bucket_size": "5e8"}, "a whole number of at least 0 is needed"),
        ({"overlap_comm": "true"}, "true or false is needed"),
        ({"stage": 4}, "say 0, 1, 2 or 3"),
    ],
)
def test_what_zero_optimization_must_not_say(
    tmp_path: Path, zero: dict[str, Any], words: str
) -> None:
    (problem,) = problems(tmp_path, {"zero_optimization": {"stage": 3, **zero}})
    assert words in problem
    key, value = next(iter(zero.items()))
    path = f"{key}.{list(value)[-1]}" if key.startswith("offload_param") and value else key
    assert problem.startswith(f"zero_optimization.{path.split('.')[0]}")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"prescale_gradients": True}, "prescale_gradients: the loss needs the plain mean"),
        ({"gradient_predivide_factor": 2.0}, "the plain mean"),
        ({"gradient_allreduce_op": "sum"}, "the mean over the ranks"),
        ({"torch_autocast": {"enabled": True}}, "the dtype of the run"),
        ({"compile": {"deepcompile": True}}, "trains without it"),
        ({"tensor_parallel": {"autotp_size": 2}}, "trains without it"),
        ({"amp": {"enabled": True}}, "no such feature"),
        ({"bfloat16": {"enabled": True}}, "write bf16"),
        ({"bf16": True}, "bf16 is true; an object {...} is needed"),
        ({"data_types": {"param_dtype": "fp16"}}, "the run decides"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "plain AdamW"),
        ({"zero_optimisation": {"stage": 3}}, "did you mean zero_optimization?"),
        ({"stage": 3}, "it belongs to zero_optimization"),
    ],
)
def test_what_the_file_must_not_say(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    (problem,) = problems(tmp_path, config)
    assert words in problem


def test_fp16s_keys_inside_bf16_are_all_named(tmp_path: Path) -> None:
    """DeepSpeed refuses them too, but only once the data have been read, and one at a time."""
    keys = ["loss_scale", "initial_scale_power", "hysteresis", "min_loss_scale"]
    found = problems(tmp_path, {"bf16": {"enabled": "auto", **dict.fromkeys(keys, 16)}})
    assert found == [f"bf16.{key}: bf16 has no loss scale; remove it" for key in keys]


def test_what_asks_for_nothing_is_accepted(tmp_path: Path) -> None:
    """Keys of published files that mean nothing here, or leave a feature off."""
    nothing = {
        "_comment": "from a tutorial",
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
        "aio": {"block_size": "auto", "queue_depth": 8},
        "amp": {"enabled": "auto", "opt_level": "auto"},
        "autotuning": {"enabled": False},
        "checkpoint": {"tag_validation": "Warn"},
        "compile": {"deepcompile": False},
        "elasticity": {"enabled": False},
        "fp16": {"enabled": False, "loss_scale": 0, "auto_cast": False},
        "gradient_allreduce_op": "mean",
        "gradient_predivide_factor": 1.0,
        "prescale_gradients": False,
        "data_types": {"grad_accum_dtype": None},
    }
    zero = {
        "_note": ["any", "value"],
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": "auto",
        "stage3_gather_fp16_weights_on_model_save": True,
        "elastic_checkpoint": True,
        "zero_hpz_partition_size": 1,
        "mics_shard_size": -1,
        "mics_hierarchical_params_gather": False,
        "zero_quantized_weights": False,
        "zenflow": None,
        "cpu_offload": False,
        "offload_param": {"device": "none", "nvme_path": "/local_nvme", "buffer_count": 5},
    }
    kept = {"stage": 3, "offload_param": {"device": "none"}}
    plain = resolve(tmp_path, {"zero_optimization": kept})
    assert resolve(tmp_path, {**nothing, "zero_optimization": zero}) == plain
    # DeepSpeed 0.19 refuses the mere presence of some of them.
    DeepSpeedConfig(plain)
