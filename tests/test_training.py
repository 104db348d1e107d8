"""Whole runs in real processes against transformers + PEFT + torch's AdamW, step by step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from oracle import base_model, copy_lora, document_loss_sum, ours_to_peft, with_lora
from runs import ALPHA, CUTOFF, DECAY, RANK, RATE, STEPS, Ground, adapter, log, run_jobs, stage_file
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from minilora.arguments import read_settings
from minilora.data.batches import Documents
from minilora.data.prepare import prepare
from minilora.data.schedule import Schedule
from minilora.files.adapter import read_adapter
from minilora.files.weights import read_config
from minilora.model.lora_shape import LoraShape

GLOBAL_ROWS = 12
# (ranks, per device batch, accumulation, ZeRO stage), all of 12 rows per optimizer step.
COMBINATIONS = [(1, 12, 1, 0), (1, 3, 4, 3), (2, 2, 3, 3), (3, 2, 2, 3), (3, 1, 4, 2), (2, 6, 1, 1)]
MODELS = ("tiny", "tiny_tied")


@dataclass(frozen=True)
class Expected:
    losses: list[float]
    norms: list[float]
    adapter: dict[str, Tensor]


@pytest.fixture(scope="session")
def expected(ground: Ground) -> Callable[[str, bool], Expected]:
    """The same training by transformers, PEFT and torch, document by document."""

    @cache
    def train(model: str, packing: bool) -> Expected:
        job = ground.job("oracle", model, packing=packing, per_device_train_batch_size=GLOBAL_ROWS)
        settings = read_settings([f"--{key}={value}" for key, value in job.items()], "train")
        documents = prepare(settings, colour=False).documents
        schedule = Schedule(
            documents.lengths, settings.train.seed, GLOBAL_ROWS, CUTOFF, packing, max_steps=STEPS
        )
        return peft_training(ground, model, documents, schedule)

    return train


def peft_training(ground: Ground, model: str, documents: Documents, schedule: Schedule) -> Expected:
    peft = with_lora(base_model(ground.models[model]), RANK, ALPHA)
    _, shape = read_config(ground.models[model])
    shapes = LoraShape(RANK, ALPHA, 0.0, tuple(shape.linear_shapes())).parameter_shapes(shape)
    copy_lora(read_adapter(ground.adapters[model], shapes).items(), peft)
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    rates = get_cosine_schedule_with_warmup(optimizer, 2, STEPS)
    losses, norms = [], []
    for step in range(STEPS):
        rows = schedule.rows(step)
        count = int(documents.labelled[rows].sum())
        total = torch.zeros(())
        for row in rows:
            inside = slice(documents.offsets[row], documents.offsets[row + 1])
            ids = torch.from_numpy(documents.tokens[inside].astype("int64"))
            mask = torch.from_numpy(documents.trained[inside].copy())
            labels = torch.where(mask, ids, -100)
            labels = torch.cat([labels[1:], torch.tensor([-100])])
            total = total + document_loss_sum(peft, ids, labels)
        loss = total / count
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 0.5)))
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    parameters = dict(peft.named_parameters())
    found = {name: parameters[ours_to_peft(name)].detach().clone() for name in shapes}
    return Expected(losses, norms, found)


@pytest.fixture(scope="session")
def parity_jobs(ground: Ground, launch: Callable[..., tuple[int, str]]) -> dict[Any, Any]:
    """Every combination on both models, packing off and on; one start per number of ranks."""
    jobs = {}
    for combination, model, packing in itertools.product(COMBINATIONS, MODELS, (False, True)):
        ranks, batch, accumulation, stage = combination
        name = "-".join(map(str, (*combination, model, packing)))
        jobs[combination, model, packing] = ground.job(
            name,
            model,
            packing=packing,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            deepspeed=str(stage_file(ground.folder, stage)),
        )
    for ranks in (1, 2, 3):
        run_jobs(launch, ranks, [job for key, job in jobs.items() if key[0][0] == ranks])
    return jobs


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packing"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_training_equals_peft(
    combination: tuple[int, ...],
    model: str,
    packing: bool,
    parity_jobs: dict[Any, Any],
    expected: Callable[[str, bool], Expected],
) -> None:
    job, oracle = parity_jobs[combination, model, packing], expected(model, packing)
    assert log(job, "loss") == pytest.approx(oracle.losses, rel=1e-5)
    assert log(job, "grad_norm") == pytest.approx(oracle.norms, rel=1e-4)
    found = adapter(job)
    assert len(found) == len(oracle.adapter)
    for name, tensor in oracle.adapter.items():
        mine = found[f"base_model.model.{name}.weight"]
        torch.testing.assert_close(mine, tensor, rtol=1e-3, atol=1e-3 * float(tensor.abs().max()))
