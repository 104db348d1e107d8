"""All settings of one run together, and what must hold between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilora.settings.errors import RequestError
from minilora.settings.fields import value_problems
from minilora.settings.keys import (
    DataSettings,
    MethodSettings,
    ModelSettings,
    TrainSettings,
    all_settings,
)

# The rest of the package takes the groups of settings from here.
__all__ = ["DataSettings", "MethodSettings", "ModelSettings", "Settings", "TrainSettings"]


class ContradictionError(RequestError):
    """Settings that are sound one by one, and not together."""


@dataclass(frozen=True)
class Settings:
    """All settings of one run, checked one by one and then together.

    notices: lines to show once, such as which known keys were ignored
    origins: key -> where its value came from, for the keys that were given

    Raises RequestError with every problem of every setting; ContradictionError where there is none
    of them alone.
    """

    model: ModelSettings = ModelSettings()
    method: MethodSettings = MethodSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    notices: tuple[str, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = self.to_dict()
        problems = [
            problem
            for _, item in all_settings()
            for problem in value_problems(item, values[item.name], self.name_of(item.name))
        ]
        if problems:
            raise RequestError(problems)

        # Contradictions are looked for between sound values only.
        problems = [*self._data_problems(), *self._memory_problems()]
        problems += self._quantization_problems()
        problems += [*self._validation_problems(), *self._best_model_problems()]
        if problems:
            raise ContradictionError(problems)

    @property
    def base(self) -> Path:
        """The folder of the base model; the commands that need it require the key."""
        assert self.model.model_name_or_path, "required by read_settings"
        return Path(self.model.model_name_or_path)

    @property
    def output(self) -> Path:
        """The folder that a run writes into; training requires the key."""
        assert self.train.output_dir, "required by read_settings"
        return Path(self.train.output_dir)

    @property
    def packs(self) -> bool:
        """packing, or its default: yes for plain text, no for conversations."""
        return self.method.stage == "pt" if self.data.packing is None else self.data.packing

    @property
    def keeps_what_fits(self) -> bool:
        """Whether the run decides how many blocks keep their activations: as many as fit."""
        return self.train.keep_blocks is None and not self.model.disable_gradient_checkpointing

    @property
    def validates(self) -> bool:
        """Whether the run validates at all."""
        return self.train.eval_strategy != "no"

    def to_dict(self) -> dict[str, Any]:
        """Every key and value, flat and in the order of --help."""
        return {
            item.name: getattr(getattr(self, group), item.name) for group, item in all_settings()
        }

    def name_of(self, key: str) -> str:
        """The key as messages name it: with the place its value came from."""
        return f"{key} ({self.origins[key]})" if key in self.origins else key

    def _data_problems(self) -> Iterator[str]:
        """Contradictions in what is learned."""
        targets = self.method.lora_target
        if self.data.mask_history and self.data.train_on_prompt:
            yield (
                f"{self.name_of('mask_history')} and {self.name_of('train_on_prompt')} contradict "
                "each other: set one of them to false"
            )
        if "all" in targets and len(targets) > 1:
            yield (
                f"{self.name_of('lora_target')}: all already means every layer; give all alone, "
                "or only names"
            )

    def _memory_problems(self) -> Iterator[str]:
        """Contradictions in what is kept, recomputed and gathered."""
        train = self.train
        keeps_all = self.model.disable_gradient_checkpointing
        if train.gather_tokens is not None and train.gather_tokens < train.least_tile_tokens:
            yield (
                f"{self.name_of('gather_tokens')}: {train.gather_tokens} is less than tile_tokens "
                f"{train.least_tile_tokens}; raise it or lower tile_tokens"
            )

        if train.offload_activations and keeps_all:
            yield (
                f"{self.name_of('offload_activations')} moves what recomputing starts from: set "
                "disable_gradient_checkpointing to false"
            )
        if train.keep_blocks is not None and keeps_all:
            yield (
                f"{self.name_of('disable_gradient_checkpointing')} keeps every block; remove "
                f"{self.name_of('keep_blocks')}"
            )

    def _quantization_problems(self) -> Iterator[str]:
        """Other numbers of bits than the one that there is."""
        bits = self.model.quantization_bit
        if bits not in (None, 4):
            yield (
                f"{self.name_of('quantization_bit')}: {bits} is not supported: 4 is, or remove the "
                "key, and the frozen weights stay in bf16, split over the GPUs"
            )

    def _validation_problems(self) -> Iterator[str]:
        """Contradictions between the rows to validate with and when to validate."""
        data = self.data
        has_rows = bool(data.eval_dataset or data.val_size)

        if self.validates and not has_rows:
            yield (
                f"{self.name_of('eval_strategy')}: nothing to validate with; give eval_dataset or "
                "val_size"
            )
        if has_rows and not self.validates:
            key = "eval_dataset" if data.eval_dataset else "val_size"
            yield (
                f"{self.name_of(key)}: nothing validates with these rows; set eval_strategy: "
                "epoch, or steps, or remove the key"
            )

        if data.eval_dataset and data.val_size:
            yield f"{self.name_of('eval_dataset')} and {self.name_of('val_size')}: give one of them"
        if self.train.early_stopping_steps and not self.validates:
            yield f"{self.name_of('early_stopping_steps')} counts validations: set eval_strategy"

    def _best_model_problems(self) -> Iterator[str]:
        """What finding the best model needs. The last two conditions are the HF Trainer's."""
        train = self.train
        if not train.load_best_model_at_end:
            return

        name = self.name_of("load_best_model_at_end")
        if not self.validates:
            yield f"{name} needs validations: set eval_strategy"
        elif train.save_strategy != train.eval_strategy:
            yield (
                f"{name}: {self.name_of('save_strategy')} and {self.name_of('eval_strategy')} "
                "must be the same"
            )
        elif train.save_strategy == "steps" and not _is_multiple(
            train.save_steps, train.eval_every
        ):
            yield (
                f"{name}: {self.name_of('save_steps')} must be a multiple of eval_steps, which is "
                f"{train.eval_every}"
            )


def _is_multiple(save_steps: float, eval_steps: float) -> bool:
    """Whether every snapshot is also a validation; a share and a number of steps do not compare.

    Shares are compared as whole millionths, as in transformers: 0.3 % 0.1 is not 0.
    """
    if (save_steps < 1) != (eval_steps < 1):
        return False
    unit = 1_000_000 if save_steps < 1 else 1
    return round(save_steps * unit) % max(1, round(eval_steps * unit)) == 0
