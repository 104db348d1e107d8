"""Whole runs in real processes against transformers + PEFT + torch's AdamW, step by step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from minilora.data.documents import Documents
from minilora.data.schedule import Schedule
from minilora.files.adapter import read_adapter, stored_name
from minilora.files.model_config import read_model_config
from minilora.settings.command_line import read_settings
from tests.support.combinations import (
    COMBINATIONS,
    FAMILY_COMBINATIONS,
    FAMILY_STEPS,
    FOUR_BITS,
    MODELS,
    OTHER_COMBINATIONS,
    OTHER_MODELS,
    model_of_start,
)
from tests.support.oracle import (
    base_model,
    copy_lora,
    document_loss_sum,
    in_four_bits,
    ours_to_peft,
    with_lora,
)
from tests.support.prepared import prepared_of
from tests.support.runs import (
    ALPHA,
    CUTOFF,
    DECAY,
    RANK,
    RATE,
    STEPS,
    VARIANTS,
    Ground,
    adapter,
    check_loading,
    log,
    run_jobs,
    stage_file,
    variant_shape,
)

GLOBAL_ROWS = 12
FAMILY: dict[str, tuple[str, dict[str, Any]]] = {  # by name: a start adapter, other settings
    **{name: (name, {}) for name in VARIANTS},
    "loraplus": ("dora", {"loraplus_lr_ratio": 8.0}),
}


@dataclass(frozen=True)
class Expected:
    losses: list[float]
    norms: list[float]
    adapter: dict[str, Tensor]


@pytest.fixture(scope="session")
def expected(ground: Ground) -> Callable[[str, bool], Expected]:
    """The same training by transformers, PEFT and torch, document by document."""

    @cache
    def train(name: str, packing: bool) -> Expected:
        start, settings = FAMILY.get(name, (name, {}))
        job = ground.job(
            "oracle",
            model_of_start(start),
            packing=packing,
            per_device_train_batch_size=GLOBAL_ROWS,
            max_steps=FAMILY_STEPS if name in FAMILY else STEPS,
        )
        read = read_settings([f"--{key}={value}" for key, value in job.items()], "train")
        documents = prepared_of(read).documents
        limits = {"packing": packing, "max_steps": job["max_steps"]}
        schedule = Schedule(documents.lengths, read.train.seed, GLOBAL_ROWS, CUTOFF, **limits)
        return peft_training(ground, start, documents, schedule, **settings)

    return train


def peft_training(
    ground: Ground,
    start: str,
    documents: Documents,
    schedule: Schedule,
    loraplus_lr_ratio: float | None = None,
) -> Expected:
    model, fields = ground.models[model_of_start(start)], VARIANTS.get(start, {})
    if start == "packable_dora":
        fields = VARIANTS["dora"]
    shape = read_model_config(model).shape
    lora = variant_shape(shape, fields)
    more = {"modules_to_save": None, **fields, "targets": lora.targets}
    base = base_model(model)
    if start.startswith("packable"):
        in_four_bits(base)
    peft = with_lora(base, RANK, ALPHA, **more)
    shapes = lora.parameter_shapes(shape)
    copy_lora(read_adapter(ground.adapters[start], shapes).items(), peft)
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    assert len(trained) == len(shapes)
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    if loraplus_lr_ratio is not None:
        optimizer = create_loraplus_optimizer(
            peft,
            torch.optim.AdamW,
            lr=RATE,
            loraplus_lr_ratio=loraplus_lr_ratio,
            loraplus_weight_decay=DECAY,
        )
    rates = get_cosine_schedule_with_warmup(optimizer, 2, schedule.total_steps)
    losses, norms = [], []
    for step in range(schedule.total_steps):
        rows = schedule.document_ids(step)
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
            keep_weights=(ranks, stage, packing) == (3, 3, False),
        )
    for combination, name in itertools.product(FAMILY_COMBINATIONS, FAMILY):
        ranks, batch, accumulation, stage = combination
        start, settings = FAMILY[name]
        jobs[combination, name, False] = ground.job(
            "-".join(map(str, (*combination, name))),
            "tiny",
            adapter_name_or_path=str(ground.adapters[start]),
            max_steps=FAMILY_STEPS,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            deepspeed=str(stage_file(ground.folder, stage)),
            **settings,
        )
    for combination, model in itertools.product(OTHER_COMBINATIONS, OTHER_MODELS):
        ranks, batch, accumulation, stage = combination
        jobs[combination, model, False] = ground.job(
            "-".join(map(str, (*combination, model))),
            model,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            deepspeed=str(stage_file(ground.folder, stage)),
            keep_weights=(ranks, stage) == (3, 3),
        )
    for name, (combination, start, packing, settings) in FOUR_BITS.items():
        ranks, batch, accumulation, stage = combination
        jobs[combination, name, packing] = ground.job(
            f"four-bits-{name.replace(' ', '-').replace(',', '')}",
            "packable",
            adapter_name_or_path=str(ground.adapters[start]),
            quantization_bit=4,
            packing=packing,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            deepspeed=str(stage_file(ground.folder, stage)),
            keep_weights=True,
            **settings,
        )
    for ranks in (1, 2, 3):
        run_jobs(launch, ranks, [job for key, job in jobs.items() if key[0][0] == ranks])
    return jobs


def check_run(job: dict[str, Any], oracle: Expected) -> None:
    assert log(job, "loss") == pytest.approx(oracle.losses, rel=1e-5)
    assert log(job, "grad_norm") == pytest.approx(oracle.norms, rel=1e-4)
    found = adapter(job)
    assert found.keys() == {stored_name(name) for name in oracle.adapter}
    for name, tensor in oracle.adapter.items():
        mine = found[stored_name(name)]
        torch.testing.assert_close(mine, tensor, rtol=1e-3, atol=1e-3 * float(tensor.abs().max()))


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
    check_run(parity_jobs[combination, model, packing], expected(model, packing))


@pytest.mark.parametrize("model", OTHER_MODELS)
@pytest.mark.parametrize("combination", OTHER_COMBINATIONS, ids=str)
def test_other_families_train_as_in_peft(
    combination: tuple[int, ...],
    model: str,
    parity_jobs: dict[Any, Any],
    expected: Callable[[str, bool], Expected],
) -> None:
    check_run(parity_jobs[combination, model, False], expected(model, False))


@pytest.mark.parametrize("model", [*MODELS, *OTHER_MODELS])
def test_three_ranks_load_their_thirds_bit_for_bit(parity_jobs: dict[Any, Any], model: str) -> None:
    check_loading(parity_jobs[(3, 2, 2, 3), model, False], 3)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("combination", FAMILY_COMBINATIONS, ids=str)
def test_the_lora_family_trains_as_in_peft(
    combination: tuple[int, ...],
    name: str,
    parity_jobs: dict[Any, Any],
    expected: Callable[[str, bool], Expected],
) -> None:
    check_run(parity_jobs[combination, name, False], expected(name, False))


def test_the_family_differs(expected: Callable[[str, bool], Expected]) -> None:
    """Otherwise the test above would compare one training with itself."""
    ends = [expected(name, False).losses[-1] for name in (*FAMILY, "tiny")]
    assert min(abs(a - b) for a, b in itertools.combinations(ends, 2)) > 1e-4


def four_bits_job(name: str, jobs: dict[Any, Any]) -> tuple[dict[str, Any], str, bool]:
    """A job of FOUR_BITS, its start adapter, and whether it packs documents."""
    combination, start, packing, _ = FOUR_BITS[name]
    return jobs[combination, name, packing], start, packing


@pytest.mark.parametrize("name", [name for name in FOUR_BITS if name != "bf16"])
def test_training_over_four_bits_equals_peft_over_the_unpacked_weights(
    name: str, parity_jobs: dict[Any, Any], expected: Callable[[str, bool], Expected]
) -> None:
    job, start, packing = four_bits_job(name, parity_jobs)
    check_run(job, expected(start, packing))
    check_loading(job, FOUR_BITS[name][0][0], FOUR_BITS[name][0][3])


def test_four_bits_in_bf16_are_within_its_rounding(
    parity_jobs: dict[Any, Any], expected: Callable[[str, bool], Expected]
) -> None:
    job, start, packing = four_bits_job("bf16", parity_jobs)
    exact = expected(start, packing)
    assert log(job, "loss") == pytest.approx(exact.losses, rel=1e-2)
    assert log(job, "loss") != pytest.approx(exact.losses, rel=1e-5)
    assert log(job, "grad_norm") == pytest.approx(exact.norms, rel=5e-2)
    check_loading(job, 2)


def test_four_bits_differ(ground: Ground) -> None:
    """Otherwise the tests above would hold of weights that are not packed, too."""
    models = (base_model(ground.models["packable"]) for _ in range(2))
    plain, packed = next(models), in_four_bits(next(models))
    token_ids = torch.arange(40)[None]
    with torch.no_grad():
        assert (plain(token_ids).logits - packed(token_ids).logits).abs().max() > 0.1
