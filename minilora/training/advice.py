"""One line of advice on the learning rate, the size of a step and the rank; never a refusal.

It goes by "LoRA Without Regret" (Schulman et al., Thinking Machines Lab, 2025) and by the rule that
its authors published with it, `get_lr` in tinker-cookbook's hyperparam_utils.py:

    learning_rate = 5e-5 x 10 x (2000 / hidden_size) ^ exponent    at lora_alpha 32

They found that the best rate hardly depends on the rank where the update is scaled by
alpha / rank, as it is here. docs/settings.md says more. This file needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minilora.model.llama_shape import LlamaShape
from minilora.model.lora_shape import LoraShape
from minilora.settings.settings import TrainSettings

if TYPE_CHECKING:  # the plan needs no numpy, which these import
    from minilora.data.documents import Documents
    from minilora.data.schedule import Schedule

FULL_TRAINING = 5e-5  # the rule's rate for a model of RULE_HIDDEN that is trained whole
LORA_FACTOR = 10
RULE_HIDDEN = 2000
RULE_ALPHA = 32
# By the beginning of `model_type` in config.json. No other family was measured.
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}

# From a third of the rule to three times the rule nothing is said. The rule is a fit, not a law,
# and the loss is flat around the best rate.
TOLERANCE = 3
# The smallest models of the rule have a hidden size of 2,048 (1B). Below half of that, as for the
# demo's model, nothing is said at all.
SMALLEST_HIDDEN = 1024
# Bounds of ours. LoRA bears large batches less well than full training, so many documents per step
# and few steps are worth a word.
MOST_DOCUMENTS = 64
FEWEST_STEPS = 100


@dataclass(frozen=True)
class Amounts:
    """How much is trained on.

    documents: per optimizer step of all GPUs, on average.
    steps, labelled_tokens: of the run and of the data; None where the data were not read.
    """

    documents: float
    steps: int | None = None
    labelled_tokens: int | None = None

    @classmethod
    def of(cls, documents: Documents, schedule: Schedule) -> Amounts:
        """Those of a run from its start: `schedule` must not be one that resumes."""
        return cls(
            documents=len(documents) / schedule.steps_per_epoch(0),
            steps=schedule.total_steps,
            labelled_tokens=int(documents.labelled.sum()),
        )


def advice(
    model_type: str, shape: LlamaShape, lora: LoraShape, train: TrainSettings, amounts: Amounts
) -> list[str]:
    """The line, or none where nothing is to be said. model_type: of config.json."""
    if shape.hidden_size < SMALLEST_HIDDEN:
        return []
    remarks = [
        *_on_the_rate(published_rate(model_type, shape.hidden_size, lora), lora, train),
        *_on_the_steps(amounts),
        *_on_the_rank(lora.size(shape), amounts.labelled_tokens),
    ]
    return [f"advice: {'; '.join(remarks)}; see docs/settings.md"] if remarks else []


def published_rate(model_type: str, hidden_size: int, lora: LoraShape) -> float | None:
    """The rule's learning rate for this alpha, None for a family that was not measured.

    lora_B starts at zero, and AdamW moves each of its numbers by about learning_rate in a step.
    So a step moves a weight by about scaling x learning_rate, where the scaling is alpha / rank.
    At the same rank, the rate rule x 32 / alpha moves it as the rule's rate does at alpha 32.
    """
    # rsLoRA's scaling is alpha / sqrt(rank), which is that of the alpha alpha x sqrt(rank).
    alpha = lora.alpha * (math.sqrt(lora.rank) if lora.use_rslora else 1)
    for family, exponent in EXPONENTS.items():
        if model_type.startswith(family):
            rule: float = FULL_TRAINING * LORA_FACTOR * (RULE_HIDDEN / hidden_size) ** exponent
            return rule * RULE_ALPHA / alpha
    return None


def _on_the_rate(rate: float | None, lora: LoraShape, train: TrainSettings) -> Iterator[str]:
    # The rule is for LoRA alone at one rate: with LoRA+, and with whole layers, there are others.
    if rate is None or train.loraplus_lr_ratio is not None or lora.modules_to_save:
        return
    ratio = train.learning_rate / rate
    if not 1 / TOLERANCE <= ratio <= TOLERANCE:
        far = f"{ratio:.2g} times" if ratio > 1 else f"1/{1 / ratio:.2g} of"
        yield (
            f"learning_rate {train.learning_rate:.2g} is {far} the {rate:.1e} that a published "
            f"rule gives for lora_rank {lora.rank} and lora_alpha {lora.alpha:g}"
        )


def _on_the_steps(amounts: Amounts) -> Iterator[str]:
    if amounts.documents > MOST_DOCUMENTS:
        yield (
            f"a step has {amounts.documents:.0f} documents; LoRA does best with small steps, of up "
            f"to about {MOST_DOCUMENTS}"
        )
    if amounts.steps is not None and amounts.steps < FEWEST_STEPS:
        yield f"the run has {amounts.steps} steps, and fewer than {FEWEST_STEPS} learn little"


def _on_the_rank(parameters: int, labelled_tokens: int | None) -> Iterator[str]:
    """The rule of Tinker's documentation: as many parameters as tokens that are learned."""
    if labelled_tokens is not None and labelled_tokens > parameters:
        yield (
            f"{labelled_tokens:,} labelled tokens are more than the {parameters:,} parameters of "
            "the adapter; a higher lora_rank holds more"
        )
