"""Keys of LLaMA-Factory and of the Hugging Face Trainer that are no settings of minilora.

Some are refused, because they ask for something that minilora does not do. The others change
nothing about what is learned here: they are ignored, and listed in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Refusal(NamedTuple):
    """Why a key is refused.

    harmless: the values that ask for nothing, so that they are taken in silence, besides null and
        an empty list or text
    remedy: what to do instead of any other value
    """

    harmless: tuple[str, ...]
    remedy: str


OFF = ("false", "no", "none", "off", "0", "0.0")
ON = ("true", "yes", "on", "1")
ADAMW = ("adamw_torch", "adamw_torch_fused")
# Who packs to 4 bits: the same bytes come from bitsandbytes and from here.
BY_HAND = ("bnb", "bitsandbytes")

# A line for each remedy: the keys, their harmless values, and the remedy.
REFUSED: Mapping[str, Refusal] = {
    key: Refusal(harmless, remedy)
    for keys, harmless, remedy in (
        ("adapter_folder", (), "give the whole path as adapter_name_or_path"),
        ("add_special_tokens", OFF, "use tokens that the tokenizer already has"),
        ("add_tokens", OFF, "use tokens that the tokenizer already has"),
        ("new_special_tokens", OFF, "use tokens that the tokenizer already has"),
        ("auto_find_batch_size", OFF, "set tile_tokens, which bounds memory at any batch size"),
        ("create_new_adapter", OFF, "merge the first adapter with minilora.merge, then train"),
        ("data_seed", (), "seed decides the data order too"),
        ("dataloader_drop_last", OFF, "every row is used; remove the key"),
        ("do_predict predict_with_generate", OFF, "use minilora.generate after the training"),
        ("do_train", ON, "set it to true; minilora.generate answers, minilora.plan plans"),
        ("enable_thinking", ON, "use template: qwen3_nothink, which adds no thoughts to answers"),
        ("finetuning_type", ("lora",), "set it to lora, the only kind trained here"),
        ("fp16 fp8", OFF, "use bf16: true"),
        (
            "fsdp parallelism_config use_kt use_mca",
            OFF,
            "use deepspeed, which splits the weights over the GPUs",
        ),
        ("full_determinism", OFF, "remove it; on a CPU the same seed gives the same bytes"),
        ("init_special_tokens", ("noise_init",), "use tokens that the tokenizer already has"),
        ("interleave_probs", OFF, "bring the datasets to the sizes you want, then list them"),
        ("label_smoothing_factor", OFF, "remove it; the loss is plain cross-entropy"),
        ("logging_strategy", ("steps",), "set logging_steps"),
        ("lr_scheduler_kwargs", OFF, "remove it; each schedule has its standard shape"),
        ("master_addr master_port", (), "give it to torchrun or deepspeed, which start the run"),
        ("max_length max_seq_length", (), "set cutoff_len"),
        ("mix_strategy", ("concat",), "bring the datasets to the sizes you want, then list them"),
        ("mixture_of_depths", OFF, "remove it; only dense models are trained"),
        ("neftune_noise_alpha", OFF, "remove it"),
        ("new_special_tokens_config", OFF, "use tokens that the tokenizer already has"),
        ("optim", ADAMW, "use adamw_torch, the only optimizer here"),
        ("optim_args", OFF, "set adam_beta1, adam_beta2 and adam_epsilon"),
        ("pissa_init", OFF, "remove it; LoRA starts as PEFT starts it"),
        ("preserve_thinking", OFF, "remove it; the chat template decides what earlier turns keep"),
        ("pure_bf16", OFF, "use bf16: true; the frozen weights are then bf16 already"),
        ("push_to_hub", OFF, "upload output_dir yourself after the training"),
        ("quantization_method", BY_HAND, "use bnb with quantization_bit: 4, or remove both"),
        ("quantization_type", ("nf4",), "use nf4, the only kind of 4 bits here"),
        ("resize_vocab", OFF, "use tokens that the tokenizer already has"),
        ("rope_scaling", OFF, "set it in the config.json of the base model"),
        ("save_safetensors", ON, "remove it; only safetensors files are written"),
        ("shift_attn", OFF, "remove it; attention is always full within a document"),
        ("streaming", OFF, "remove it; the rows are turned into tokens before training"),
        ("tokenized_path", OFF, "give the rows themselves as dataset"),
        ("tool_format", OFF, "remove it; the chat template decides how tools are written"),
        ("train_from_scratch", OFF, "remove it; LoRA needs trained weights"),
        ("train_sampling_strategy", ("random", "group_by_length"), "set disable_shuffling"),
        ("use_adam_mini use_apollo use_badam", OFF, "use optim: adamw_torch"),
        ("use_asft_loss use_dft_loss", OFF, "remove it; the loss is plain cross-entropy"),
        ("use_cpu", OFF, "hide the GPUs instead: CUDA_VISIBLE_DEVICES="),
        ("use_eaft_loss", OFF, "remove it; the loss is plain cross-entropy"),
        ("use_galore use_muon", OFF, "use optim: adamw_torch"),
        ("use_llama_pro", OFF, "remove it; only LoRA is trained"),
        ("use_swanlab", OFF, "remove it; trainer_log.jsonl holds every number"),
        ("use_unsloth", OFF, "remove it; use_unsloth works on one GPU only"),
    )
    for key in keys.split()
}

IGNORED = frozenset(
    key
    for keys in (
        # How something is computed, but not what: attention kernels, memory, speed.
        "bf16_full_eval enable_liger_kernel flash_attn fp16_full_eval gradient_checkpointing",
        "gradient_checkpointing_kwargs group_by_length length_column_name liger_kernel_config",
        "low_cpu_mem_usage offload_folder skip_memory_metrics tf32 torch_empty_cache_steps",
        "upcast_layernorm upcast_lmhead_output use_cache use_kv_cache use_liger_kernel",
        "use_reentrant_gc use_unsloth_gc use_v1_kernels",
        "activation_checkpointing activation_checkpointing_kwargs enable_jit_checkpoint",
        # How processes share the work.
        "accelerator_config average_tokens_across_devices ddp_backend ddp_broadcast_buffers",
        "ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph fsdp_config",
        "data_shared_file_system",
        "placement_strategy resources_per_worker save_on_each_node",
        # How rows are read and become tokens.
        "buffer_size cache_dir ignore_data_skip ignore_pad_token_for_loss",
        "label_names media_dir overwrite_cache remove_unused_columns reserved_label_len",
        "trust_remote_code use_fast_tokenizer",
        # How validation is batched; which scores are written does not depend on it here.
        "compute_accuracy do_eval eval_accumulation_steps eval_delay eval_do_concat_batches",
        "eval_on_each_dataset eval_on_start eval_use_gather_object per_device_eval_batch_size",
        "batch_eval_metrics prediction_loss_only sortish_sampler use_legacy_prediction_loop",
        # What is printed, and which accounts are used.
        "debug disable_tqdm hf_hub_token log_level log_level_replica log_on_each_node logging_dir",
        "enable_torch_profiler project",
        "logging_first_step logging_nan_inf_filter model_revision ms_hub_token om_hub_token",
        "print_param_status restore_callback_states_from_checkpoint run_name",
        # How answers are drawn, which training never does.
        "do_sample eval_num_beams length_penalty max_new_tokens num_beams repetition_penalty",
        "skip_special_tokens temperature top_k top_p",
        # Details of other objectives and models, and of features whose main key is refused.
        "audio_sampling_rate crop_to_patches dpo_label_smoothing ld_alpha",
        "loraplus_lr_embedding module_dropout moe_aux_loss_coef optim_target_modules",
        "pissa_convert pissa_iter quantization_device_map",
        "asft_alpha eaft_alpha simpo_gamma use_audio_in_video",
    )
    for key in keys.split()
)

# Ignored too, but each with its reason: whoever sets it expects memory from it.
EXPLAINED: Mapping[str, str] = {
    "double_quantization": "the scales of 4-bit weights stay exact, at 0.12 bit more for a weight",
}

# Keys that begin so are ignored too: details of other commands, of other objectives, and of
# features whose main key is refused.
IGNORED_PREFIXES = (
    "apollo_", "badam_", "dataloader_", "export_", "fp8_", "freeze_", "galore_", "generation_",
    "hub_", "image_", "include_", "infer_", "kt_", "kto_", "oft_", "ppo_", "pref_",
    "preprocessing_", "profiler_", "ray_", "ref_model", "reward_model", "sglang_", "swanlab_",
    "torch_compile", "trackio_", "video_", "vllm_",
)  # fmt: skip


# Older names of settings.
ALIASES: Mapping[str, str] = {"evaluation_strategy": "eval_strategy"}


def asks_for_nothing(value: object, harmless: tuple[str, ...]) -> bool:
    """Whether a value leaves its feature off: null, empty, or nothing but harmless words."""
    for item in value if isinstance(value, list) else [value]:
        is_harmless = isinstance(item, str) and item.strip().lower() in harmless
        if item and not is_harmless:
            return False
    return True
