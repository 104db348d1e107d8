"""All that DeepSpeed does for the run: processes, partitions, gradients, the optimizer step."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import deepspeed
import torch
from deepspeed import utils as ds
from deepspeed.runtime.config import DeepSpeedConfig
from torch import Tensor, nn

from minilora.data.steps import Span
from minilora.files.deepspeed_file import zero_stage
from minilora.files.weights import Checkpoint, TensorPart, read_parts
from minilora.model.llama import Block, Llama
from minilora.model.lora import LoraLinear, inject, lora_parameters, parameter_groups
from minilora.model.lora_shape import MAGNITUDE, LoraShape
from minilora.model.tiles import document_tiles
from minilora.processes.startup_times import StartupTimes
from minilora.processes.world import World
from minilora.settings.errors import RequestError, RunError
from minilora.settings.settings import TrainSettings

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by torch's names


@dataclass(frozen=True)
class ModelRecipe:
    """What the engine builds: which weights, which adapter, how partitioned.

    adapter: parameter name to tensor, to continue from; empty for a new one. keep_blocks: how many
    blocks, the last ones, keep their activations.
    """

    checkpoint: Checkpoint
    lora: LoraShape
    adapter: Mapping[str, Tensor]
    train: TrainSettings
    ds_config: dict[str, Any]
    keep_blocks: int


class Engine:
    """A Llama with LoRA in DeepSpeed's hands."""

    def __init__(self, world: World, plan: ModelRecipe, phases: StartupTimes) -> None:
        _wake_deepspeed(world, plan)
        self.world, self.shape = world, plan.checkpoint.shape
        self.stage = zero_stage(plan.ds_config)
        self.dtype = (
            torch.bfloat16
            if plan.train.computes_in_bf16(world.device.type == "cuda")
            else torch.float32
        )
        # From stage 1 on DeepSpeed keeps the fp32 master of bf16 parameters, by name. At stage 0
        # its wrapper has no names, so there the trained parameters are their own master.
        self.trained_dtype = self.dtype if self.stage else torch.float32
        ds_config = plan.ds_config | ({} if self.stage else {"bf16": {"enabled": False}})
        self.model = self._build(plan)
        phases.finished("model")
        with world.agreed():
            self.bytes_read = read_parts(plan.checkpoint, self._pieces())
        for name, value in (plan.adapter or self._magnitudes()).items():
            start, kept = self._partition(self.model.get_parameter(name))
            kept.copy_(value.view(-1)[start : start + len(kept)])
        phases.finished("weights")
        if self.stage == 3:
            ds.set_z3_leaf_modules(self.model, [Block])
        train, self.tile_tokens = plan.train, plan.train.tile_tokens
        self.adam = torch.optim.AdamW(
            parameter_groups(self.model, train.loraplus_lr_ratio),
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            weight_decay=train.weight_decay,
        )
        self.adam.register_step_pre_hook(lambda *_: self._check_norm())
        _import_muon()
        self.engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.adam, config=ds_config, dist_init_required=False
        )
        self.engine.train()
        phases.finished("DeepSpeed")
        self.grad_norm = 0.0

    def forward_backward(self, span: Span, scale: float, last: bool) -> Tensor:
        """One DeepSpeed micro-step: loss of the span times `scale`, its gradients accumulated.

        last: whether the optimizer step follows. Returns a scalar in fp32 on the device.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        loss = self._forward(span, scale)
        self.engine.backward(loss)
        return loss.detach()

    @torch.no_grad()
    def score(self, span: Span) -> Tensor:
        """Summed loss and right guesses of the span, (2,) fp32, without dropout. Collective."""
        self.engine.eval()
        scores = self._forward(span, 1.0)
        self.engine.train()
        return scores

    def _forward(self, span: Span, scale: float) -> Tensor:
        device = self.world.device
        like = torch.empty(0, dtype=self.dtype, device=device)
        tiles = document_tiles(self.shape, span.tiles, span.seed, like, self.tile_tokens)
        token_ids = span.token_ids.to(device, non_blocking=True)
        result: Tensor = self.engine(token_ids, span.labels, tiles, scale)
        return result

    def step(self, rate: float) -> float:
        """Clip, AdamW at this learning rate, and clear. Returns the norm before clipping.

        Raises RunError, on every rank and with the weights untouched, if it is not finite.
        """
        for group in self.adam.param_groups:
            group["lr"] = rate * group["ratio"]
        if self.engine.optimizer is self.adam:  # stage 0 in fp32: DeepSpeed keeps no norm
            grads = [p.grad for _, p in lora_parameters(self.model) if p.grad is not None]
            self.grad_norm = float(nn.utils.get_total_norm(grads))
        self.engine.step()  # AdamW's hook checks the norm first
        self._check_norm()
        return self.grad_norm

    def monitor(self, step: int, values: Mapping[str, float]) -> None:
        """Hand figures to TensorBoard, W&B or a CSV file, as the DeepSpeed file asks for."""
        if self.engine.monitor.enabled:
            events = [(f"minilora/{name}", value, step) for name, value in values.items()]
            self.engine.monitor.write_events(events)

    def trained_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and fp32 master copy of each trained parameter, on rank 0's CPU. Collective."""
        for name, parameter in lora_parameters(self.model):
            full = ds.safe_get_full_fp32_param(parameter) if self.stage else parameter
            if self.world.rank == 0:  # a head in every process would fill the machine
                yield name, full.detach().cpu().clone()

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """AdamW's moments, `NAME.exp_avg` and `NAME.exp_avg_sq`, fp32, rank 0. Collective."""
        self._link_moments()
        for name, parameter in lora_parameters(self.model):
            for moment in MOMENTS:
                if self.stage:
                    full = ds.safe_get_full_optimizer_state(parameter, moment)
                else:
                    full = self.adam.state[parameter][moment]
                if self.world.rank == 0:
                    yield f"{name}.{moment}", full.detach().cpu().clone()

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Put back masters and moments after `steps` steps, whatever the stage they come from."""
        for flat in self._optimized():
            zeros = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            self.adam.state[flat] = {"step": torch.tensor(float(steps)), **zeros}
        self._link_moments()
        for name, parameter in lora_parameters(self.model):
            moments = {moment: tensors[f"{name}.{moment}"] for moment in MOMENTS}
            start, kept = self._partition(parameter)
            kept.copy_(tensors[name].view(-1)[start : start + len(kept)])
            if self.stage == 3:
                self._restore_partition(parameter, tensors[name], moments)
            elif self.stage:
                ds.safe_set_full_fp32_param(parameter, tensors[name])
                for moment, value in moments.items():
                    ds.safe_set_full_optimizer_state(parameter, value, moment)
            else:
                for moment, value in moments.items():
                    self.adam.state[parameter][moment].copy_(value)

    def _link_moments(self) -> None:
        """Stages 1 and 2: let DeepSpeed find the moments by parameter.

        Left to itself it looks once, after its first group's step, when others have none yet.
        """
        if self.stage in (1, 2):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _optimized(self) -> list[Tensor]:
        """The tensors that AdamW sees: DeepSpeed's flat fp32 partitions, or the parameters."""
        if self.stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return [tensor for group in self.adam.param_groups for tensor in group["params"]]

    def _restore_partition(
        self, parameter: Any, full: Tensor, moments: Mapping[str, Tensor]
    ) -> None:
        """Stage 3: this rank's part of each, padded as DeepSpeed pads the last ranks' parts."""
        size = parameter.ds_tensor.ds_numel
        rows = slice(self.world.rank * size, (self.world.rank + 1) * size)
        parts = {
            key: nn.functional.pad(part, (0, size - len(part)))
            for key, value in {"": full, **moments}.items()
            for part in (value.view(-1)[rows],)
        }
        ds.safe_set_local_fp32_param(parameter, parts.pop(""))
        for moment, part in parts.items():
            ds.safe_set_local_optimizer_state(parameter, part, moment)
        assert not parameter.data.numel(), "restored before anything was gathered"

    def _check_norm(self) -> None:
        """DeepSpeed has the global norm, the same on all ranks, before it updates anything."""
        if self.engine.optimizer is not self.adam:
            self.grad_norm = float(self.engine.optimizer._global_grad_norm)
        if not math.isfinite(self.grad_norm):
            raise RunError(
                f"the gradient's norm is {self.grad_norm}; nothing was updated. Lower learning_rate"
            )

    def _build(self, plan: ModelRecipe) -> Llama:
        """The model with empty weights: partitioned as it is made at stage 3, whole otherwise."""
        place: Any = self.world.device
        if self.stage == 3:  # the dtype from the file: on a CPU zero.Init misreads the argument
            place = _Partitioned(config_dict_or_path=plan.ds_config, mem_efficient_linear=False)
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with place:
                model = Llama(self.shape, plan.keep_blocks)
                inject(model, plan.lora, plan.train.seed, self.trained_dtype)
            model.lm_head.chunk_rows = plan.train.loss_tokens
            if plan.train.offload_activations:
                model.model.offload_inputs()
        finally:
            torch.set_default_dtype(default)
        return model

    def _magnitudes(self) -> dict[str, Tensor]:
        """Where DoRA's magnitudes start: the norms of the weights' rows, in fp32. Collective."""
        norms = {}
        for path, layer in self.model.named_modules():
            if isinstance(layer, LoraLinear) and layer.lora_magnitude_vector is not None:
                with deepspeed.zero.GatheredParameters([layer.weight], enabled=self.stage == 3):
                    norms[f"{path}.{MAGNITUDE}"] = layer.weight.float().norm(dim=1)
        return norms

    def _pieces(self) -> Iterator[TensorPart]:
        """What this rank reads: its partition of each base weight, or the whole of it."""
        for name, parameter in self.model.named_parameters():
            if ".lora_" not in name:
                start, kept = self._partition(parameter)
                if len(kept):
                    yield TensorPart(name, start, kept)

    def _partition(self, parameter: Any) -> tuple[int, Tensor]:
        """What this rank keeps of a parameter: the first element's place, and the elements."""
        if self.stage < 3:
            return 0, parameter.data.view(-1)
        size = parameter.ds_tensor.ds_numel  # of all partitions; the last ones are padded
        start = self.world.rank * size
        count = max(0, min(size, parameter.ds_numel - start))
        return start, parameter.ds_tensor.data[:count]


class _Partitioned(deepspeed.zero.Init):  # type: ignore[misc]
    """zero.Init without the broadcast from rank 0 of values that are about to be read."""

    def _zero_init_param(self, param: Any) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()


def _wake_deepspeed(world: World, plan: ModelRecipe) -> None:
    """Let DeepSpeed use the process group that is there, and say no more than it is asked to.

    Raises RequestError for a configuration that DeepSpeed does not take.
    """
    if not plan.train.verbose_deepspeed:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed calls torch's collectives by names that torch is about to change.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if world.device.type == "cpu":
        # Compiling this op takes 30 s and a compiler, and training never calls it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=plan.train.verbose_deepspeed)
    try:
        DeepSpeedConfig(dict(plan.ds_config))
    except Exception as error:  # of many kinds, and in many lines
        reason = " ".join(str(error).partition("[type=")[0].split())
        raise RequestError([f"deepspeed: {plan.train.deepspeed}: {reason}"]) from None


def _import_muon() -> None:
    """Import DeepSpeed's Muon, as its `initialize` does to see that AdamW is another optimizer.

    Left to itself this imports torch's whole compiler, 3 seconds for decorators of unused code.
    """
    compiling = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        with suppress(ImportError):
            import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        torch.compile = compiling
