"""Keys of LLaMA-Factory and the Hugging Face Trainer that are no settings here, and their fate.

A key of REFUSED is an error unless its value asks for nothing; a key of IGNORED changes
nothing about what is learned, so it is listed in one line and dropped.
"""

from collections.abc import Mapping

OFF = "false no none off 0 0.0"
ON = "true yes on 1"

# Key -> (values that ask for nothing, what to do instead of any other value).
REFUSED: Mapping[str, tuple[str, str]] = {
    key: (harmless, remedy)
    for keys, harmless, remedy in (
        ("adapter_folder", "", "give the whole path as adapter_name_or_path"),
        ("add_special_tokens add_tokens new_special_tokens_config resize_vocab", OFF,
         "use tokens that the tokenizer already has"),
        ("auto_find_batch_size", OFF, "set tile_tokens, which bounds memory at any batch size"),
        ("create_new_adapter", OFF, "merge the first adapter with minilora.merge, then train"),
        ("data_seed", "", "seed decides the data order too"),
        ("dataloader_drop_last", OFF, "every row is used; remove the key"),
        ("do_predict predict_with_generate", OFF, "use minilora.generate after the training"),
        ("do_train", ON, "set it to true; minilora.generate answers, minilora.plan plans"),
        ("evaluation_strategy", OFF, "the key is eval_strategy now"),
        ("finetuning_type", "lora", "set it to lora, the only kind trained here"),
        ("fp16 fp8", OFF, "use bf16: true"),
        ("fsdp use_kt use_mca", OFF, "use deepspeed, which splits the weights over the GPUs"),
        ("full_determinism", OFF, "remove it; on a CPU the same seed gives the same bytes"),
        ("init_special_tokens", "noise_init", "use tokens that the tokenizer already has"),
        ("interleave_probs", OFF, "bring the datasets to the sizes you want, then list them"),
        ("label_smoothing_factor use_asft_loss use_dft_loss use_eaft_loss", OFF,
         "remove it; the loss is plain cross-entropy"),
        ("logging_strategy", "steps", "set logging_steps"),
        ("lr_scheduler_kwargs", OFF, "remove it; each schedule has its standard shape"),
        ("max_length max_seq_length", "", "set cutoff_len"),
        ("mix_strategy", "concat", "bring the datasets to the sizes you want, then list them"),
        ("mixture_of_depths", OFF, "remove it; only plain Llama is trained"),
        ("neftune_noise_alpha", OFF, "remove it"),
        ("optim_args", OFF, "set adam_beta1, adam_beta2 and adam_epsilon"),
        ("pissa_init", OFF, "remove it; LoRA starts as PEFT starts it"),
        ("pure_bf16", OFF, "use bf16: true; the frozen weights are then bf16 already"),
        ("push_to_hub", OFF, "upload output_dir yourself after the training"),
        ("quantization_bit", OFF, "remove it; the frozen weights stay bf16, split over the GPUs"),
        ("rope_scaling", OFF, "set it in the config.json of the base model"),
        ("save_safetensors", ON, "remove it; only safetensors files are written"),
        ("shift_attn", OFF, "remove it; attention is always full within a document"),
        ("streaming", OFF, "remove it; the rows are turned into tokens before training"),
        ("tokenized_path", OFF, "give the rows themselves as dataset"),
        ("tool_format", OFF, "remove it; the chat template decides how tools are written"),
        ("train_from_scratch", OFF, "remove it; LoRA needs trained weights"),
        ("train_sampling_strategy", "random group_by_length", "set disable_shuffling"),
        ("use_adam_mini use_apollo use_badam use_galore use_muon", OFF, "use optim: adamw_torch"),
        ("use_cpu", OFF, "hide the GPUs instead: CUDA_VISIBLE_DEVICES="),
        ("use_llama_pro", OFF, "remove it; only LoRA is trained"),
        ("use_swanlab", OFF, "remove it; trainer_log.jsonl holds every number"),
        ("use_unsloth", OFF, "remove it; use_unsloth works on one GPU only"),
    )
    for key in keys.split()
}  # fmt: skip

IGNORED = frozenset(
    """
    accelerator_config audio_sampling_rate average_tokens_across_devices bf16_full_eval buffer_size
    cache_dir compute_accuracy crop_to_patches ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
    ddp_find_unused_parameters ddp_static_graph debug disable_tqdm do_sample double_quantization
    dpo_label_smoothing enable_liger_kernel enable_thinking eval_accumulation_steps eval_delay
    eval_do_concat_batches eval_num_beams eval_on_each_dataset eval_on_start
    eval_use_gather_object do_eval fp16_full_eval fsdp_config gradient_checkpointing
    gradient_checkpointing_kwargs group_by_length hf_hub_token ignore_data_skip
    ignore_pad_token_for_loss label_names ld_alpha length_column_name length_penalty
    liger_kernel_config log_level log_level_replica log_on_each_node logging_dir logging_first_step
    logging_nan_inf_filter loraplus_lr_embedding low_cpu_mem_usage max_new_tokens media_dir
    model_revision module_dropout moe_aux_loss_coef ms_hub_token num_beams
    offload_folder om_hub_token optim_target_modules overwrite_cache per_device_eval_batch_size
    pissa_convert pissa_iter placement_strategy prediction_loss_only print_param_status
    quantization_device_map quantization_method quantization_type remove_unused_columns
    repetition_penalty reserved_label_len resources_per_worker
    restore_callback_states_from_checkpoint run_name save_on_each_node simpo_gamma
    skip_memory_metrics skip_special_tokens split_special_tokens temperature tf32 top_k top_p
    torch_empty_cache_steps trust_remote_code upcast_layernorm upcast_lmhead_output
    use_audio_in_video use_cache use_fast_tokenizer use_kv_cache use_legacy_prediction_loop
    use_liger_kernel use_reentrant_gc use_unsloth_gc use_v1_kernels
    """.split()
)

# Details of other commands, and of features that REFUSED turns away by their main key.
IGNORED_PREFIXES = tuple(
    """
    apollo_ badam_ dataloader_ export_ fp8_ freeze_ galore_ generation_ hub_ image_ include_ infer_
    kt_ kto_ oft_ ppo_ pref_ preprocessing_ ray_ ref_model reward_model sglang_ swanlab_
    torch_compile trackio_ video_ vllm_
    """.split()
)


def asks_for_nothing(value: object, harmless: str) -> bool:
    """Whether a value leaves its feature off: null, empty, or nothing but harmless words."""
    values = value if isinstance(value, list) else [value]
    return all(
        not item or (isinstance(item, str) and item.strip().lower() in harmless.split())
        for item in values
    )
