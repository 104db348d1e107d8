"""LoRA fine-tuning of Llama models with DeepSpeed ZeRO-3, small enough to read in an afternoon."""

__version__ = "0.1.0"
