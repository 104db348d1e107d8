"""The outside implementation that tests compare with: transformers, PEFT and torch's AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint as transformers loads it, with eager attention in one document."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")


def with_lora(
    model: Any, rank: int, alpha: float, targets: Sequence[str] | str = TARGETS, **more: Any
) -> PeftModel:
    """PEFT's LoRA over the model, dropout 0; more: of LoraConfig's."""
    named = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=named, task_type="CAUSAL_LM", **more
    )
    return get_peft_model(model, config)


def ours_to_peft(name: str) -> str:
    """Our parameter name as PEFT names it in a live model."""
    module, _, kind = name.rpartition(".")
    if kind == "weight":  # trained whole
        return f"base_model.model.{module}.modules_to_save.default.weight"
    return f"base_model.model.{name}.default.weight"


def copy_lora(ours: Iterable[tuple[str, Tensor]], peft: PeftModel) -> None:
    """Give PEFT's model our adapter."""
    theirs = dict(peft.named_parameters())
    with torch.no_grad():
        for name, tensor in ours:
            theirs[ours_to_peft(name)].copy_(tensor)


def document_loss_sum(model: Any, token_ids: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy of one document; labels are already shifted, -100 means none."""
    logits = model(token_ids[None]).logits[0].float()
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
