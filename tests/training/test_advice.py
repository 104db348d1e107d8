"""The advice on learning rate, step and rank: the published numbers, and when it is silent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minilora import plan
from minilora.data.documents import Documents
from minilora.data.schedule import Schedule
from minilora.files.model_config import shape_from_config
from minilora.model.lora_shape import LoraShape
from minilora.settings.settings import TrainSettings
from minilora.training.advice import Amounts, advice, published_rate

ROOT = Path(__file__).resolve().parents[2]
LLAMA_31_8B = ROOT / "examples/llama-3.1-8b"
SHAPE = shape_from_config(json.loads((LLAMA_31_8B / "config.json").read_text(encoding="utf-8")))
LORA = LoraShape(16, 32, 0.0, ("q_proj", "v_proj"))
USUAL = Amounts(64, 100, 1000)


@pytest.mark.parametrize(
    ("model_type", "hidden_size", "rate"),
    [
        ("llama", 2048, 4.9e-4),  # 1B
        ("llama", 4096, 2.9e-4),  # 8B
        ("llama", 8192, 1.7e-4),  # 70B
        ("qwen2", 2000, 5.0e-4),
        ("qwen3", 4096, 4.73e-4),  # 8B: 5e-4 x 0.48828 ^ 0.0775
    ],
)
def test_the_published_rates_are_those_at_alpha_32_of_any_rank(
    model_type: str, hidden_size: int, rate: float
) -> None:
    for rank in (1, 16, 256):
        found = published_rate(model_type, hidden_size, replace(LORA, rank=rank))
        assert found == pytest.approx(rate, rel=0.03)
    assert published_rate("mistral", hidden_size, LORA) is None


def test_another_alpha_asks_for_another_rate_so_that_the_product_stays() -> None:
    at_32 = published_rate("llama", 4096, LORA)
    assert at_32 is not None
    for lora, alpha in (
        (replace(LORA, alpha=16), 16),
        (replace(LORA, alpha=64), 64),
        (replace(LORA, alpha=8, use_rslora=True), 8 * 4),  # 8 / sqrt(16) is 32 / 16
    ):
        assert published_rate("llama", 4096, lora) == pytest.approx(at_32 * 32 / alpha)


def said(lora: LoraShape = LORA, amounts: Amounts = USUAL, **train: Any) -> str:
    settings = TrainSettings(**{"learning_rate": 2.9e-4, **train})
    return "".join(advice("llama", SHAPE, lora, settings, amounts))


def test_nothing_is_said_of_usual_settings() -> None:
    assert said() == ""
    for rate in (1e-4, 2e-4, 8.5e-4):  # to a third, and to three times the rule
        assert said(learning_rate=rate) == ""
    assert said(replace(LORA, alpha=16), learning_rate=2e-4) == ""


def test_one_line_says_all_that_is_unusual() -> None:
    text = said(
        replace(LORA, rank=1),
        Amounts(112.4, 99, LORA.size(SHAPE)),
        learning_rate=2.8e-5,
    )
    assert text == (
        "advice: learning_rate 2.8e-05 is 1/10 of the 2.9e-04 that a published rule gives for "
        "lora_rank 1 and lora_alpha 32; a step has 112 documents; LoRA does best with small "
        "steps, of up to about 64; the run has 99 steps, and fewer than 100 learn little; "
        "6,815,744 labelled tokens are more than the 425,984 parameters of the adapter; a higher "
        "lora_rank holds more; see docs/settings.md"
    )
    assert "learning_rate 0.01 is 35 times the 2.9e-04" in said(learning_rate=1e-2)
    assert "documents" in said(amounts=Amounts(65)) and not said(amounts=Amounts(64))


def test_the_rule_is_for_lora_alone_at_one_rate_and_for_real_models() -> None:
    assert said(learning_rate=1e-2)
    assert not said(learning_rate=1e-2, loraplus_lr_ratio=4.0)
    assert not said(replace(LORA, modules_to_save=("lm_head",)), learning_rate=1e-2)
    tiny = replace(SHAPE, hidden_size=512)
    assert advice("llama", tiny, LORA, TrainSettings(learning_rate=1), Amounts(999, 1, 10**9)) == []


def test_amounts_are_counted_from_the_documents() -> None:
    """Seven documents of 3 tokens, of which the first predicts nothing; two per step."""
    documents = Documents(
        np.arange(21, dtype=np.int32), np.ones(21, dtype=bool), np.arange(0, 22, 3)
    )
    schedule = Schedule(documents.lengths, 1, 2, max_steps=-1, num_train_epochs=2.0)
    assert Amounts.of(documents, schedule) == Amounts(7 / 4, 8, 14)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "words"),
    [
        ("llama31_8b_7x4090.yaml", ["learning_rate 5e-05 is 1/11 of the 5.7e-04", "112 documents"]),
        ("recommended.yaml", []),
    ],
)
def test_the_plan_speaks_of_the_articles_job_and_not_of_the_recommended_one(
    example: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(ROOT / "examples" / example), "--model_name_or_path", str(LLAMA_31_8B)]
    assert plan.main([*command, "--num_gpus", "7"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("advice")]
    assert len(lines) == bool(words)
    assert all(word in line for line in lines for word in words)
