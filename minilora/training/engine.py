"""All that DeepSpeed does for a run: it partitions weights, reduces gradients, and steps.

What is private in DeepSpeed stays in deepspeed_internals.py. No other file imports DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed import utils as ds
from torch import Tensor, nn

from minilora.data.steps import Span
from minilora.files.deepspeed_file import zero_stage
from minilora.files.second_partition import second_partition
from minilora.files.tensor_parts import TensorPart
from minilora.files.weights import Checkpoint, read_parts
from minilora.files.weights_digest import WeightsDigest, added
from minilora.model.build import NewAdapter, build_model
from minilora.model.llama import Block, Llama
from minilora.model.lora import LoraLinear, copies_of_pairs, lora_parameters, parameter_groups
from minilora.model.lora_shape import MAGNITUDE, LoraShape
from minilora.model.tiles import document_tiles
from minilora.processes.startup_times import StartupTimes
from minilora.processes.world import World
from minilora.settings.errors import RunError
from minilora.settings.settings import TrainSettings
from minilora.training import deepspeed_internals as internals

MOMENTS = ("exp_avg", "exp_avg_sq")  # the state of torch's AdamW, by its names


@dataclass(frozen=True)
class ModelRecipe:
    """What the engine builds: which weights, which adapter, how they are partitioned.

    adapter: parameter name to tensor, where training continues an adapter; empty for a new one
    ds_config: DeepSpeed's configuration without "auto" values
    keep_blocks: how many blocks, the last ones, save their activations instead of recomputing them
    tile_tokens: how many tokens a block's MLP computes at a time
    """

    checkpoint: Checkpoint
    lora: LoraShape
    adapter: Mapping[str, Tensor]
    train: TrainSettings
    ds_config: dict[str, Any]
    keep_blocks: int
    tile_tokens: int


class Engine:
    """A Llama with LoRA in DeepSpeed's hands. All methods but `monitor` are collective.

    bytes_read: how much of the base weights this rank has read
    base_sums: by the name of each base weight, the sum over its bytes (files.weights_digest)

    Raises RequestError for weights that cannot be read.
    """

    def __init__(self, world: World, recipe: ModelRecipe, times: StartupTimes) -> None:
        self.world, self.shape = world, recipe.checkpoint.shape
        self.stage = zero_stage(recipe.ds_config)
        self.tile_tokens = recipe.tile_tokens
        self.grad_norm = 0.0
        bf16 = recipe.train.computes_in_bf16(on_gpu=world.device.type == "cuda")
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        # AdamW needs fp32 masters of what is trained: updates of 1e-5 vanish in bf16. From stage 1
        # on DeepSpeed keeps them beside the bf16 parameters, and finds them by parameter. Its
        # wrapper of stage 0 cannot find them, so there the trained parameters are fp32 themselves.
        self.trained_dtype = self.dtype if self.stage else torch.float32

        # Empty parameters first, so that no rank ever holds a whole model that will be partitioned.
        self._start_deepspeed(recipe)
        self.model = self._build(recipe)
        times.finished("model")

        # Each rank reads only the bytes of its own partitions.
        # With ZeRO-3 it adds up all that it reads for the digest, and else its share of the names.
        names, parts = [*recipe.checkpoint.tensors], 1 if self.stage == 3 else world.size
        digest = WeightsDigest({*names[world.rank % parts :: parts]})
        with world.agreed():
            self.bytes_read = read_parts(recipe.checkpoint, self._parts_to_read(), digest)
        self.base_sums = added(world.gather_objects(digest.sums))
        self._start_adapter(recipe.adapter)
        self.copies = copies_of_pairs(self.model, self.dtype)
        times.finished("weights")

        # A block is gathered as a whole when it is entered, not one linear layer after another.
        if self.stage == 3:
            ds.set_z3_leaf_modules(self.model, [Block])
        self.adam = self._optimizer(recipe.train)
        internals.import_muon()
        # At stage 0 there are no masters beside the parameters.
        config = recipe.ds_config if self.stage else recipe.ds_config | {"bf16": {"enabled": False}}
        self.engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.adam, config=config, dist_init_required=False
        )
        internals.set_lead_of_host(self.engine, world.device)
        self.engine.train()
        times.finished("DeepSpeed")

    def forward_backward(self, span: Span, scale: float, last: bool) -> Tensor:
        """One DeepSpeed micro-step: the span's summed loss times `scale`, gradients accumulated.

        last: whether the optimizer step follows, so that DeepSpeed reduces the gradients over the
        ranks. Returns a scalar in fp32 on the device.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        loss = self._forward(span, scale)
        self.engine.backward(loss)
        return loss.detach()

    @torch.no_grad()
    def score(self, span: Span) -> Tensor:
        """The span's summed loss and its count of right guesses, (2,) fp32, without dropout."""
        self.engine.eval()
        scores = self._forward(span, 1.0)
        self.engine.train()
        return scores

    def step(self, rate: float) -> float:
        """Clip the gradient, let AdamW update at this learning rate, and clear the gradient.

        Returns the gradient's norm before clipping. Raises RunError, on every rank and before any
        weight has changed, if it is not finite.
        """
        for group in self.adam.param_groups:
            group["lr"] = rate * group["ratio"]

        # At stage 0 in fp32 DeepSpeed returns our AdamW as it is, and computes no norm.
        if self.engine.optimizer is self.adam:
            grads = [p.grad for _, p in lora_parameters(self.model) if p.grad is not None]
            self.grad_norm = float(nn.utils.get_total_norm(grads))

        # A hook before AdamW's step checks the norm. It does not run when DeepSpeed finds an
        # overflow and skips the step, so the norm is checked once more.
        self.engine.step()
        self.copies.renew()
        self._check_norm()
        return self.grad_norm

    def monitor(self, step: int, values: Mapping[str, float]) -> None:
        """Hand figures to TensorBoard, W&B or a CSV file, where the DeepSpeed file asks for it."""
        if self.engine.monitor.enabled:
            events = [(f"minilora/{name}", value, step) for name, value in values.items()]
            self.engine.monitor.write_events(events)

    def trained_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and fp32 master of each trained parameter, as a copy on the CPU of rank 0 alone."""
        for name, parameter in lora_parameters(self.model):
            whole = ds.safe_get_full_fp32_param(parameter) if self.stage else parameter
            # Copies in every process of a machine could fill it: a whole head is 2 GB in fp32.
            if self.world.rank == 0:
                yield name, whole.detach().cpu().clone()

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """AdamW's state as `NAME.exp_avg` and `NAME.exp_avg_sq`, fp32, on rank 0's CPU alone."""
        self._link_moments()
        for name, parameter in lora_parameters(self.model):
            for moment in MOMENTS:
                if self.stage:
                    whole = ds.safe_get_full_optimizer_state(parameter, moment)
                else:
                    whole = self.adam.state[parameter][moment]
                if self.world.rank == 0:
                    yield f"{name}.{moment}", whole.detach().cpu().clone()

    def restore(self, tensor: Callable[[str], Tensor], steps: int) -> None:
        """Put back the masters and moments of a snapshot, whatever stage and ranks it came from.

        tensor: gives each by name; all ranks ask for the same ones in turn. steps: done so far.
        """
        # AdamW makes its state at its first step. It must exist before anything is put into it.
        for flat in self._optimized():
            zeros = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            self.adam.state[flat] = {"step": torch.tensor(float(steps)), **zeros}
        self._link_moments()

        for name, parameter in lora_parameters(self.model):
            master = tensor(name)
            moments = {moment: tensor(f"{name}.{moment}") for moment in MOMENTS}
            # The parameter that is computed with, which bf16 training keeps beside the master.
            start, kept = self._partition(parameter)
            kept.copy_(master.view(-1)[start : start + len(kept)])

            if self.stage == 3:
                internals.set_partition(parameter, master, moments, self.world.rank)
            elif self.stage:
                ds.safe_set_full_fp32_param(parameter, master)
                for moment, value in moments.items():
                    ds.safe_set_full_optimizer_state(parameter, value, moment)
            else:
                for moment, value in moments.items():
                    self.adam.state[parameter][moment].copy_(value)
        self.copies.renew()

    def _forward(self, span: Span, scale: float) -> Tensor:
        device = self.world.device
        like = torch.empty(0, dtype=self.dtype, device=device)
        tiles = document_tiles(self.shape, span.tiles, span.seed, like, self.tile_tokens)
        token_ids = span.token_ids.to(device, non_blocking=True)
        result: Tensor = self.engine(token_ids, span.labels, tiles, scale)
        return result

    def _start_deepspeed(self, recipe: ModelRecipe) -> None:
        """Let DeepSpeed use the process group that exists."""
        train = recipe.train
        if not train.verbose_deepspeed:
            internals.silence()
        if self.world.device.type == "cpu":
            internals.skip_shared_memory_op()
        deepspeed.init_distributed(verbose=train.verbose_deepspeed)

    def _build(self, recipe: ModelRecipe) -> Llama:
        """The model with empty weights: partitioned while it is made at stage 3, else whole."""
        place: Any = self.world.device
        if self.stage == 3:
            sizes = self.world.gather_objects(second_partition(recipe.ds_config))
            internals.group_ranks(sizes, self.world.rank, recipe.train.ddp_timeout)
            # The dtype comes from the configuration: on a CPU zero.Init misreads its argument.
            place = internals.PartitionedInit(
                config_dict_or_path=recipe.ds_config, mem_efficient_linear=False
            )
        model = build_model(
            self.shape,
            NewAdapter(recipe.lora, recipe.train.seed, self.trained_dtype),
            dtype=self.dtype,
            place=place,
            keep_blocks=recipe.keep_blocks,
        )
        model.lm_head.chunk_rows = recipe.train.loss_tokens
        if recipe.train.offload_activations:
            model.model.offload_inputs()
        return model

    def _parts_to_read(self) -> Iterator[TensorPart]:
        """This rank's partition of each base weight at stage 3, or the whole of it below."""
        for name, parameter in self.model.named_parameters():
            if ".lora_" not in name:
                start, kept = self._partition(parameter)
                if len(kept):
                    yield TensorPart(name, start, kept)

    def _start_adapter(self, adapter: Mapping[str, Tensor]) -> None:
        """Copy in the adapter that training continues, or what a new DoRA starts from."""
        for name, value in (adapter or self._row_norms()).items():
            start, kept = self._partition(self.model.get_parameter(name))
            kept.copy_(value.view(-1)[start : start + len(kept)])

    def _row_norms(self) -> dict[str, Tensor]:
        """DoRA's magnitudes start as the norms of the weights' rows, computed in fp32."""
        norms = {}
        for path, layer in self.model.named_modules():
            if isinstance(layer, LoraLinear) and layer.lora_magnitude_vector is not None:
                with deepspeed.zero.GatheredParameters([layer.weight], enabled=self.stage == 3):
                    numbers = layer.matrix.numbers(self.dtype)
                    norms[f"{path}.{MAGNITUDE}"] = numbers.float().norm(dim=1)
        return norms

    def _optimizer(self, train: TrainSettings) -> torch.optim.AdamW:
        adam = torch.optim.AdamW(
            parameter_groups(self.model, train.loraplus_lr_ratio),
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            weight_decay=train.weight_decay,
        )
        adam.register_step_pre_hook(lambda *_: self._check_norm())
        return adam

    def _partition(self, parameter: Any) -> tuple[int, Tensor]:
        """What this rank holds of a parameter: the first element's index, and the elements."""
        if self.stage < 3:
            return 0, parameter.data.view(-1)
        return internals.partition_of(parameter, self.world.rank)

    def _link_moments(self) -> None:
        if self.stage in (1, 2):
            internals.link_moments(self.engine)

    def _optimized(self) -> list[Tensor]:
        """The tensors that AdamW updates: DeepSpeed's flat fp32 partitions, or the parameters."""
        if self.stage == 3:
            return internals.partitioned_masters(self.engine)
        return [tensor for group in self.adam.param_groups for tensor in group["params"]]

    def _check_norm(self) -> None:
        if self.engine.optimizer is not self.adam:
            self.grad_norm = internals.global_grad_norm(self.engine)
        if not math.isfinite(self.grad_norm):
            raise RunError(
                f"the gradient's norm is {self.grad_norm}; nothing was updated. Lower learning_rate"
            )
