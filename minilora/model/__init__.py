"""The model in plain torch: Llama, LoRA, recompute, loss. No files, no DeepSpeed."""
