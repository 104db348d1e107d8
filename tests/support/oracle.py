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

from minilora.model.nf4 import pack, unpack
from minilora.settings.command_line import read_settings
from tests.support.prepared import prepared_of

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint as transformers loads it, with eager attention in one document."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")


def in_four_bits(model: Any) -> Any:
    """The model with the numbers that its blocks' linear layers have in 4 bits."""
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = unpack(pack(module.weight.data), module.weight.dtype)
    return model


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


def validation_of(job: dict[str, Any]) -> tuple[float, float]:
    """Loss and accuracy per label of a job's validation rows, by PEFT with the adapter it left."""
    settings = read_settings([f"--{key}={value}" for key, value in job.items()], "train")
    held = prepared_of(settings).validation
    base = base_model(Path(job["model_name_or_path"]))
    model = PeftModel.from_pretrained(base, job["output_dir"])
    total, right = 0.0, 0
    for begin, end in zip(held.offsets[:-1], held.offsets[1:], strict=True):
        ids = torch.from_numpy(held.tokens[begin:end].astype("int64"))
        mask = torch.from_numpy(held.trained[begin:end].copy())
        labels = torch.cat([torch.where(mask, ids, -100)[1:], torch.tensor([-100])])
        with torch.no_grad():
            total += float(document_loss_sum(model, ids, labels))
            right += int((model(ids[None]).logits[0].argmax(-1) == labels).sum())
    count = int(held.labelled.sum())
    assert count > 50
    return total / count, right / count
