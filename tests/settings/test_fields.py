"""Values of single settings: every wrong one is answered with its key and its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from minilora.settings.errors import RequestError
from minilora.settings.settings import (
    DataSettings,
    MethodSettings,
    ModelSettings,
    Settings,
    TrainSettings,
)
from tests.support.settings_files import check_argument, check_line_of_a_file, plain

# One line of YAML -> what the message must say besides the key and its line.
WRONG_VALUES = {
    "lora_rank: 0": "0 must be at least 1",
    "lora_rank: -8": "-8 must be at least 1",
    "lora_rank: 2.5": "'2.5' is not a whole number",
    "lora_rank: eight": "'eight' is not a whole number",
    "lora_rank: true": "'true' is not a whole number",
    "lora_rank: [8, 16]": "['8', '16'] is not a whole number",
    "lora_rank: {q_proj: 8}": "{'q_proj': '8'} is not a whole number",
    "lora_rank: 1e30": "is out of range",
    "lora_rank: inf": "'inf' is not a whole number",
    'lora_rank: ""': "'' is not a whole number",
    "lora_alpha: 0": "0 must be at least 1",
    "lora_dropout: 1.0": "1.0 must be below 1",
    "lora_dropout: -0.1": "-0.1 must be at least 0",
    "lora_dropout: nan": "nan is out of range",
    "lora_target: []": "[] is not a list of names",
    'lora_target: ""': "'' is not a list of names",
    "lora_target: {a: b}": "{'a': 'b'} is not a list of names",
    "lora_target: [q_proj, [v_proj]]": "is not a list of names",
    "rank_pattern: [q_proj, 4]": "['q_proj', '4'] is not names with whole numbers",
    "rank_pattern: q_proj": "'q_proj' is not names with whole numbers",
    "rank_pattern: {q_proj: x}": "{'q_proj': 'x'} is not names with whole numbers",
    "alpha_pattern: {q_proj: 0}": "{'q_proj': 0} is not names with whole numbers",
    "alpha_pattern: {q_proj: {a: 1}}": "is not names with whole numbers",
    "use_dora: 2": "'2' is not true or false",
    "loraplus_lr_ratio: 0": "0.0 must be above 0",
    "dataset: ','": "',' is not a list of names",
    "stage: dpo": "'dpo' is not one of sft, pt",
    "stage: rm": "'rm' is not one of sft, pt",
    "cutoff_len: 1": "1 must be at least 2",
    "cutoff_len: 2k": "'2k' is not a whole number",
    "max_samples: 0": "0 must be at least 1",
    "packing: maybe": "'maybe' is not true or false",
    "packing: 2": "'2' is not true or false",
    'template: ""': "'' is no usable text; leave the key out for its default",
    "template: [llama3]": "['llama3'] is not text",
    "per_device_train_batch_size: 0": "0 must be at least 1",
    "per_device_train_batch_size: auto": "'auto' is not a whole number",
    "gradient_accumulation_steps: 0": "0 must be at least 1",
    "learning_rate: 0": "0.0 must be above 0",
    "learning_rate: -1e-4": "-0.0001 must be above 0",
    "learning_rate: 5e-5x": "'5e-5x' is not a number",
    "learning_rate: .inf": "'.inf' is not a number",
    "learning_rate: 1e999": "inf is out of range",
    "num_train_epochs: 0": "0.0 must be above 0",
    "max_steps: -2": "-2 must be at least -1",
    "lr_scheduler_type: cosin": "'cosin' is not one of linear, cosine,",
    "lr_scheduler_type: reduce_lr_on_plateau": "is not one of linear",
    "warmup_ratio: 1.5": "1.5 must be at most 1",
    "warmup_steps: 1.5": "1.5 is neither a whole number of steps nor a share below 1",
    "warmup_steps: -0.1": "-0.1 must be at least 0",
    "weight_decay: -1": "-1.0 must be at least 0",
    "max_grad_norm: -1": "-1.0 must be at least 0",
    "adam_beta1: 1": "1.0 must be below 1",
    "adam_beta2: 1.5": "1.5 must be below 1",
    "adam_epsilon: 0": "0.0 must be above 0",
    "bf16: float16": "'float16' is not true or false",
    "seed: -1": "-1 must be at least 0",
    "seed: 4294967296": "must be at most 4294967295",
    "logging_steps: 0": "0 must be above 0",
    "logging_steps: 10.5": "10.5 is neither a whole number of steps nor a share below 1",
    "eval_steps: .inf": "'.inf' is not a number",
    "save_strategy: best": "'best' is not one of steps, epoch, no",
    "save_steps: 0": "0 must be above 0",
    "save_steps: half": "'half' is not a number",
    "save_total_limit: 0": "0 must be at least 1",
    "deepspeed: {zero_optimization: {stage: 3}}": "is not text",
    "ddp_timeout: 0": "0 must be at least 1",
    "tile_tokens: 0": "0 must be at least 1",
}


@pytest.mark.parametrize("line", WRONG_VALUES)
def test_wrong_value_in_the_file(tmp_path: Path, line: str) -> None:
    check_line_of_a_file(tmp_path, line, WRONG_VALUES[line])


@pytest.mark.parametrize("line", plain(WRONG_VALUES))
def test_wrong_value_on_the_command_line(tmp_path: Path, line: str) -> None:
    check_argument(tmp_path, line, WRONG_VALUES[line])


def test_settings_made_in_python_are_checked_too() -> None:
    with pytest.raises(RequestError) as caught:
        Settings(
            ModelSettings(model_name_or_path=7),  # type: ignore[arg-type]
            MethodSettings(lora_rank=True, lora_dropout=float("nan")),
            DataSettings(dataset=("",), template="a\0b"),
            TrainSettings(learning_rate=10**400, max_steps=10**13),
        )
    starts = [
        "model_name_or_path",
        "lora_rank",
        "lora_dropout",
        "dataset",
        "template",
        "learning_rate",
    ]
    assert [problem.split(":")[0] for problem in caught.value.problems] == [*starts, "max_steps"]
    assert Settings(train=TrainSettings(learning_rate=1)).train.learning_rate == 1
