"""Every key of a DeepSpeed file, and what becomes of it here.

DeepSpeed itself takes a key in one of three ways: it goes by it, it refuses it, or it ignores it
without a word. Here every key of every section has one of three fates:

- It is handed on, once its value has the right type: HANDED_ON.
- It means nothing in a LoRA run of minilora, whatever it says, and is left out: NO_MEANING.
- It asks for what minilora does not do, and is refused with the reason: REFUSED. A value that
  leaves the feature off is taken in silence, and left out.

Any other key is a mistake. Keys that begin with an underscore are comments. The tables are those of
DeepSpeed 0.19.8; a test compares them with its own configuration classes.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool) or value in (0, 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and float(value).is_integer()


# What the value of a key that is handed on must be: in the words of messages, and the check.
KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "flag": ("true or false", _is_flag),
    "count": ("a whole number of at least 0", _is_count),
    "number": ("a number", _is_number),
    "text": ("text", lambda value: isinstance(value, str)),
    "list": ("a list", lambda value: isinstance(value, list)),
    "section": ("an object {...}", lambda value: isinstance(value, dict)),
    "any": ("", lambda value: True),
}

# The keys that DeepSpeed gets, by section and kind. The section "" is the file itself.
# optimizer, scheduler, fp16 and data_types are checked by deepspeed_file.py, and then left out.
HANDED_ON: Mapping[str, Mapping[str, str]] = {
    "": {
        "count": "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps",
        "number": "gradient_clipping steps_per_print",
        "text": "communication_data_type",
        "flag": "disable_allgather disable_python_gc dump_state memory_breakdown "
        "wall_clock_breakdown zero_allow_untested_optimizer",
        "section": "bf16 comet comms_logger csv_monitor data_types flops_profiler fp16 optimizer "
        "scheduler tensorboard timers wandb zero_optimization",
    },
    "bf16": {"flag": "check_grad_overflow enabled"},
    "comet": {
        "flag": "enabled online",
        "count": "samples_log_interval",
        "text": "api_key experiment_key experiment_name mode project workspace",
    },
    "comms_logger": {"flag": "debug enabled prof_all verbose", "list": "prof_ops"},
    "csv_monitor": {"flag": "enabled", "text": "job_name output_path"},
    "data_types": {"text": "grad_accum_dtype"},
    "flops_profiler": {
        "flag": "detailed enabled",
        "number": "module_depth profile_step recompute_fwd_factor top_modules",
        "text": "output_file",
    },
    "fp16": {"flag": "enabled"},
    "optimizer": {"text": "type", "section": "params"},
    "optimizer.params": {"number": "eps lr weight_decay", "list": "betas"},
    "scheduler": {"text": "type", "any": "params"},
    "tensorboard": {"flag": "enabled", "text": "job_name output_path"},
    "timers": {"section": "throughput"},
    "timers.throughput": {"flag": "enabled synchronized"},
    "wandb": {"flag": "enabled", "text": "group project team"},
    "zero_optimization": {
        "any": "stage",
        "count": "allgather_bucket_size reduce_bucket_size stage3_max_live_parameters "
        "stage3_max_reuse_distance stage3_model_persistence_threshold "
        "stage3_param_persistence_threshold stage3_prefetch_bucket_size sub_group_size "
        "zero_hpz_partition_size",
        "flag": "allgather_partitions contiguous_gradients enable_sanity_checks "
        "ignore_unused_parameters log_trace_cache_warnings overlap_comm parameter_alignment "
        "reduce_scatter round_robin_gradients stage3_allgather_sequential "
        "stage3_use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce",
        "section": "offload_optimizer offload_param",
    },
    "zero_optimization.offload_optimizer": {"text": "device", "flag": "pin_memory"},
    "zero_optimization.offload_param": {"text": "device", "flag": "pin_memory"},
}

# What these say does not exist here: DeepSpeed's own checkpoints, its data loader, its recomputing
# of activations, its pipelines, fp16, NVMe.
NO_MEANING: Mapping[str, str] = {
    "": "activation_checkpointing aio checkpoint dataloader_drop_last datastates_ckpt log_level "
    "managed_gradient_accumulation nebula pipeline seq_parallel_communication_data_type "
    "vocabulary_size zero_force_ds_cpu_optimizer",
    "activation_checkpointing": "contiguous_memory_optimization cpu_checkpointing "
    "number_checkpoints partition_activations profile synchronize_checkpoint_boundary",
    "aio": "block_size intra_op_parallelism overlap_events queue_depth single_submit thread_count "
    "use_gds",
    "bf16": "immediate_grad_update",
    "checkpoint": "checkpoint_serialization load_universal parallel_write tag_validation "
    "use_node_local_storage writer",
    "fp16": "auto_cast consecutive_hysteresis fp16_master_weights_and_grads hysteresis "
    "initial_scale_power loss_scale loss_scale_window min_loss_scale",
    "optimizer": "legacy_fusion",
    "optimizer.params": "torch_adam",
    "zero_optimization": "elastic_checkpoint load_from_fp32_weights memory_efficient_linear "
    "override_module_apply pipeline_loading_checkpoint save_muon_momentum_buffer_in_memory "
    "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save "
    "gather_16bit_weights_on_model_save",
    "zero_optimization.offload_optimizer": "buffer_count cpuadam_cores_perc fast_init nvme_path "
    "pipeline_read pipeline_write",
    "zero_optimization.offload_param": "buffer_count buffer_size max_in_cpu nvme_path",
}

_NO_LOSS_SCALE = "bf16 has no loss scale; remove it"
_NO_QUANTIZED = "frozen weights are gathered in the dtype of the run; remove it"
_NO_LONGER = "DeepSpeed has no such feature any more; remove it"
_NOT_USED = "minilora trains without it; remove it"
_STAGE3_NAME = "the plan knows the key by its full name; write stage3_"

# Section -> lines of the keys, the values that ask for nothing (besides null, false, "auto", and
# sections that are empty or not enabled), and the reason.
REFUSED: Mapping[str, tuple[tuple[str, tuple[Any, ...], str], ...]] = {
    "": (
        ("autotuning data_efficiency hybrid_engine", (), _NOT_USED),
        ("bfloat16", (), "write bf16"),
        ("compile", ({"deepcompile": False},), _NOT_USED),
        ("expert_parallel use_data_before_expert_parallelism", (), _NOT_USED),
        ("gradient_allreduce_op", ("mean",), "the loss needs the mean over the ranks; remove it"),
        ("gradient_predivide_factor", (1, 1.0), "the loss needs the plain mean; remove it"),
        ("prescale_gradients", (), "the loss needs the plain mean; remove it"),
        ("tensor_parallel", ({"autotp_size": 0}, {"autotp_size": 1}), _NOT_USED),
        ("torch_autocast", (), "weights and activations have the dtype of the run; remove it"),
        ("weight_quantization", (), _NOT_USED),
        ("amp compression_training curriculum_learning eigenvalue elasticity", (), _NO_LONGER),
        ("graph_harvesting progressive_layer_drop quantize_training", (), _NO_LONGER),
        ("sparse_attention sparse_gradients", (), _NO_LONGER),
    ),
    "bf16": (
        ("bf16_master_weights_and_grads bf16_optimizer_states", (),
         "updates of 1e-5 vanish in bf16, so masters and moments are fp32; remove it"),
        ("auto_cast consecutive_hysteresis fp16_master_weights_and_grads", (), _NO_LOSS_SCALE),
        ("hysteresis initial_scale_power loss_scale loss_scale_window", (), _NO_LOSS_SCALE),
        ("min_loss_scale", (), _NO_LOSS_SCALE),
    ),
    "data_types": (
        ("buffer_dtype param_dtype", (), "the run decides the dtypes; remove it"),
        ("keep_in_fp32_modules", (), "the run decides the dtypes; remove it"),
    ),
    "optimizer.params": (
        ("adam_w_mode bias_correction", (True, 1), "minilora trains with plain AdamW; remove it"),
        ("amsgrad", (0,), "minilora trains with plain AdamW; remove it"),
        ("max_grad_norm", (0,), "write gradient_clipping"),
    ),
    "zero_optimization": (
        ("mics_shard_size", (-1, 0), "DeepSpeed 0.19 has no MiCS any more; remove it"),
        ("mics_hierarchical_params_gather zeropp_loco_param", (), _NO_LONGER),
        ("zero_quantized_weights zero_quantized_nontrainable_weights", (), _NO_QUANTIZED),
        ("zero_quantized_gradients", (), "gradients are reduced as they are; remove it"),
        ("zenflow", (), _NOT_USED),
        ("compute_grad_norm", (True, 1), "every step logs and clips the norm; remove it"),
        ("leaf_module stage3_module_granularity_threshold", (0,),
         "the decoder blocks are the leaf modules; remove it"),
        ("legacy_stage1", (), _NO_LONGER),
        ("cpu_offload", (), 'write "offload_optimizer": {"device": "cpu"}'),
        ("cpu_offload_param", (), 'write "offload_param": {"device": "cpu"}'),
        ("cpu_offload_use_pin_memory", (), 'write "pin_memory" into the offload section'),
        ("allgather_sequential max_live_parameters max_reuse_distance", (), _STAGE3_NAME + "..."),
        ("model_persistence_threshold module_granularity_threshold", (), _STAGE3_NAME + "..."),
        ("param_persistence_threshold prefetch_bucket_size", (), _STAGE3_NAME + "..."),
        ("use_all_reduce_for_fetch_params", (), _STAGE3_NAME + "..."),
    ),
    "zero_optimization.offload_optimizer": (
        ("ratio", (1, 1.0), "all of the optimizer's state lies in one place; remove it"),
        ("super_offload", (), _NOT_USED),
    ),
}  # fmt: skip


def known_keys(section: str) -> dict[str, str]:
    """Every key of a section, and which table has it: its kind, "no meaning" or "refused"."""
    keys = {
        key: kind
        for kind, names in HANDED_ON.get(section, {}).items()
        for key in names.split()
    }  # fmt: skip
    keys |= dict.fromkeys(NO_MEANING.get(section, "").split(), "no meaning")
    for names, _, _ in REFUSED.get(section, ()):
        keys |= dict.fromkeys(names.split(), "refused")
    return keys


def sections() -> set[str]:
    """The names of all sections whose keys are in the tables, with dots; "" is the file itself."""
    return {*HANDED_ON, *NO_MEANING, *REFUSED}


def what_deepspeed_gets(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The keys that are handed on and have the right type, "auto" values among them.

    path: the name of the section, as in the tables.
    """
    kinds = known_keys(path)
    result = {}
    for key, value in config.items():
        kind = kinds.get(key, "")
        if kind in KINDS and value is not None and (value == "auto" or KINDS[kind][1](value)):
            inner = f"{path}.{key}".lstrip(".")
            is_section = inner in sections() and isinstance(value, dict)
            result[key] = what_deepspeed_gets(value, inner) if is_section else value
    return result


def key_problems(config: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """A line for every key that is unknown, refused, or has a value of the wrong type."""
    kinds = known_keys(path)
    for key, value in config.items():
        name = f"{path}.{key}".lstrip(".")
        kind = kinds.get(key)
        if key.startswith("_") or value is None:
            continue
        if kind is None:
            yield f"{name} is not a key of DeepSpeed's that is used here: {_hint(key, path)}"
        elif kind == "refused":
            yield from _refusal(name, path, key, value)
        elif kind in KINDS and value != "auto" and not KINDS[kind][1](value):
            yield f"{name} is {json.dumps(value)}; {KINDS[kind][0]} is needed"
        elif name in sections() and isinstance(value, dict):
            yield from key_problems(value, name)


def _refusal(name: str, path: str, key: str, value: Any) -> Iterator[str]:
    """A line with the reason, if this value of a refused key asks for something."""
    for names, harmless, reason in REFUSED[path]:
        if key not in names.split():
            continue
        on_by_default = any(item is True for item in harmless)
        off = _is_off(value) and not (on_by_default and value is False)
        if not off and value not in harmless:
            yield f"{name}: {reason}"


def _is_off(value: Any) -> bool:
    """Whether a value leaves any feature off."""
    if isinstance(value, dict) and "enabled" in value:
        value = value["enabled"]
    return value is False or value in (None, "auto", "", "none") or value == {} or value == []


def _hint(key: str, path: str) -> str:
    """What was perhaps meant: the closest key of the section, or the section that has this key."""
    close = difflib.get_close_matches(key, known_keys(path), n=1, cutoff=0.7)
    if close:
        return f"did you mean {close[0]}?"
    for section in sorted(sections()):
        if known_keys(section).get(key) in KINDS:
            return f"it belongs to {section or 'the top level'}"
    return "remove it"
