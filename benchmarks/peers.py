"""The peers: the Hugging Face Trainer with PEFT, and a plain loop over transformers and PEFT."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.turns import Turns
from benchmarks.workloads import (
    LLAMA_FACTORY,
    SIZES,
    TARGETS,
    Size,
    micro_batches,
    padded,
    rows,
    weight,
)

BETAS = (0.9, 0.999)


def run(turns: Turns) -> None:
    """Train until the turns are over."""
    if turns.order.variant.system == "trainer":
        _trainer(turns)
    else:
        _bare(turns)


def _trainer(turns: Turns) -> None:
    order, size = turns.order, SIZES[turns.order.size]
    on_gpu = order.device == "cuda"
    if order.variant.stage:
        deepspeed.init_distributed("nccl" if on_gpu else "gloo")
    arguments = TrainingArguments(
        output_dir=f"{order.folder}/{order.variant.name}",
        per_device_train_batch_size=size.per_device,
        gradient_accumulation_steps=size.accumulation,
        max_steps=order.steps + 1,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        # LLaMA-Factory's default (use_reentrant_gc), and fewer gathers than the other kind.
        gradient_checkpointing=order.variant.recompute,
        gradient_checkpointing_kwargs={"use_reentrant": True},
        deepspeed=copy.deepcopy(LLAMA_FACTORY) if order.variant.stage == 3 else None,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        save_strategy="no",
        logging_steps=10**6,
        report_to="none",
        disable_tqdm=True,
    )
    turns.mark("processes")
    model = _model(turns, size)
    turns.mark("model")
    per_step = size.per_device * size.accumulation * order.variant.world
    made = rows(size, order.variant.workload, per_step * (order.steps + 1))
    callback = _Callback(turns)
    trainer = _InOrder(
        model=model,
        args=arguments,
        train_dataset=list(made),
        data_collator=padded,
        callbacks=[callback],
    )
    callback.trainer = trainer
    trainer.train()


class _InOrder(Trainer):
    """A Trainer that takes the rows as they come and notes its losses."""

    step_loss = 0.0

    def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self.step_loss += float(loss)
        return loss


class _Callback(TrainerCallback):
    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.trainer: Any = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        loss, self.trainer.step_loss = self.trainer.step_loss, 0.0
        if self.turns.done == 0 and dist.is_initialized():
            mean = torch.tensor(loss, device=self.turns.order.device)
            dist.all_reduce(mean)
            loss = float(mean) / dist.get_world_size()
        self.turns.counted["held"] = held(self.trainer.model)
        self.turns.step_done(loss, self._gradients)

    def _gradients(self) -> dict[str, Tensor]:
        """AdamW's first moment after one step is the clipped gradient times 1 - beta1."""
        model, found = self.trainer.accelerator.unwrap_model(self.trainer.model), {}
        state = self.trainer.optimizer.state
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and self.turns.order.variant.stage:
                moment = safe_get_full_optimizer_state(parameter, "exp_avg")
                found[_our_name(name)] = moment / (1 - BETAS[0])
            elif parameter.requires_grad:
                found[_our_name(name)] = state[parameter]["exp_avg"] / (1 - BETAS[0])
        return found


def _bare(turns: Turns) -> None:
    order, size = turns.order, SIZES[turns.order.size]
    turns.mark("processes")
    model = _model(turns, size)
    turns.mark("model")
    if order.variant.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adam = torch.optim.AdamW(trained.values(), lr=1e-4, betas=BETAS, weight_decay=0.0)

    def gradients() -> dict[str, Tensor]:
        state = adam.state
        return {_our_name(n): state[p]["exp_avg"] / (1 - BETAS[0]) for n, p in trained.items()}

    per_step = size.per_device * size.accumulation
    made = rows(size, order.variant.workload, per_step * order.steps)
    for step in range(order.steps):
        chosen = made[step * per_step : (step + 1) * per_step]
        labelled = sum(int(trained[1:].sum()) for _, trained in chosen)
        total = 0.0
        for micro in micro_batches(size, chosen):
            batch = {key: tensor.to(order.device) for key, tensor in padded(micro).items()}
            loss = model(**batch, num_items_in_batch=labelled, use_cache=False).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        adam.step()
        adam.zero_grad()
        turns.step_done(total, gradients)


def _model(turns: Turns, size: Size) -> Any:
    """transformers' Llama with PEFT's LoRA, both with the weights of their names."""
    order = turns.order
    config = LlamaConfig(**{k: v for k, v in size.config().items() if k != "model_type"})
    config._attn_implementation = "sdpa"
    dtype = torch.bfloat16 if order.device == "cuda" else torch.float32
    if order.variant.bits:
        model = _in_four_bits(turns, size, dtype)
    else:
        with torch.device(order.device):
            model = LlamaForCausalLM._from_config(config, dtype=dtype)
        _fill(model.named_parameters())
    lora = LoraConfig(
        r=size.rank,
        lora_alpha=2 * size.rank,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    _fill((name, each) for name, each in model.named_parameters() if each.requires_grad)
    return model


def _in_four_bits(turns: Turns, size: Size, dtype: torch.dtype) -> Any:
    """The base as bitsandbytes packs it while transformers reads its files, which are in bf16."""
    folder = Path(turns.order.folder) / f"{turns.order.variant.name}-{turns.rank}"
    folder.mkdir()
    like = torch.empty(0, dtype=torch.bfloat16)
    shapes = size.shape.parameter_shapes()
    tensors = {name: weight(name, shape, like) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(size.config()), encoding="utf-8")
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # PEFT's documentation wants it so for ZeRO-3
    )
    return LlamaForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", quantization_config=four_bits
    )


def held(model: Any) -> int:
    """Bytes of the frozen weights that a rank holds between steps, scales of packed ones too."""
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        part = getattr(parameter, "ds_tensor", None)
        total += parameter.data.nbytes if part is None else part.nbytes
        if (state := getattr(parameter, "quant_state", None)) is not None:
            total += state.absmax.nbytes
    return total


def _fill(parameters: Iterable[tuple[str, Any]]) -> None:
    for name, parameter in parameters:
        name = _our_name(name)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if parameter.shape == shape:
                parameter.copy_(weight(name, shape, parameter))


def _our_name(name: str) -> str:
    """A parameter's name in PEFT's model as it is in minilora's."""
    name = name.removeprefix("base_model.model.").replace(".base_layer", "")
    for letter in "AB":
        name = name.replace(f"lora_{letter}.default.weight", f"lora_{letter}")
    return name
