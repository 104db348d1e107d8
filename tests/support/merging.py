"""What tests of merging share: adapters that PEFT wrote, models that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from minilora.merge import main

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
PATTERNS = {
    **PLAIN,
    "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
    "alpha_pattern": {"k_proj": 3, r"layers\.0\..*down_proj": 20},
}
STABILISED = {
    "r": 5,
    "lora_alpha": 7,
    "target_modules": ["q_proj", "down_proj"],
    "use_rslora": True,
}


def make(base: Path, adapter: Path, std: float = 0.05, **lora: Any) -> Path:
    """Write an adapter with PEFT, its B random."""
    config = LoraConfig(task_type="CAUSAL_LM", **lora)
    peft = get_peft_model(model_of(base), config)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    peft.save_pretrained(adapter)
    return adapter


def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: Any) -> Tensor:
    token_ids = torch.arange(7, 207).view(2, 100)
    with torch.inference_mode():
        found: Tensor = model(token_ids).logits
    return found


def merge(base: Path, adapters: str | Path, folder: Path, *more: str) -> int:
    given = ["--model_name_or_path", base, "--adapter_name_or_path", adapters]
    return main([str(part) for part in (*given, "--export_dir", folder, *more)])


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        found |= load_file(file)
    return found
