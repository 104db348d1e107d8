"""From arguments to settings: the ways of writing them, and everything that is wrong at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minilora.settings.command_line import read_settings
from minilora.settings.errors import RequestError
from minilora.settings.settings import (
    DataSettings,
    MethodSettings,
    ModelSettings,
    TrainSettings,
)
from tests.support.settings_files import NEEDED, problems_of, read

# The YAML of LLaMA-Factory issue #7197: seven 4090s that ran out of memory.
ARTICLE = """
### model
model_name_or_path: /models/Llama-3.1-8B-Instruct
trust_remote_code: true
flash_attn: auto

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_alpha: 16
lora_dropout: 0
lora_target: all

### dataset
dataset_dir: data
dataset: uspto50k_canonical_smiles
template: llama3
cutoff_len: 2048
max_samples: 100000
packing: false
preprocessing_num_workers: 16

### output
output_dir: saves/llama31
logging_steps: 5
save_steps: 1000
plot_loss: true
report_to: none
include_num_input_tokens_seen: true

### train
per_device_train_batch_size: 4
gradient_accumulation_steps: 4
learning_rate: 5e-05
num_train_epochs: 30.0
lr_scheduler_type: cosine
max_grad_norm: 1.0
warmup_steps: 0
optim: adamw_torch
bf16: true
ddp_timeout: 180000000
"""


def test_the_article_runs_unchanged(tmp_path: Path) -> None:
    settings = read(tmp_path, ARTICLE, "--local_rank=3")
    assert settings.model == ModelSettings(model_name_or_path="/models/Llama-3.1-8B-Instruct")
    assert settings.method == MethodSettings(lora_rank=16, lora_alpha=16)
    assert settings.data == DataSettings(
        dataset=("uspto50k_canonical_smiles",),
        template="llama3",
        max_samples=100000,
        packing=False,
    )
    assert settings.train == TrainSettings(
        output_dir="saves/llama31",
        logging_steps=5,
        save_steps=1000,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        learning_rate=5e-5,
        num_train_epochs=30.0,
        lr_scheduler_type="cosine",
        bf16=True,
        ddp_timeout=180000000,
    )
    keys = "flash_attn, include_num_input_tokens_seen, preprocessing_num_workers, trust_remote_code"
    assert settings.notices == (f"ignored, they mean nothing here: {keys}",)


@pytest.mark.parametrize("word", ["second.yaml", "-x", "-lora_rank", "--", "=", "a/b=c"])
def test_stray_words(tmp_path: Path, word: str) -> None:
    (problem,) = problems_of(tmp_path, NEEDED, word)
    assert problem.startswith(f"{word!r} (command line) is not understood: write --key value")


def test_an_option_with_one_dash_is_no_file() -> None:
    with pytest.raises(RequestError, match="^'-r' .command line. is not understood"):
        read_settings(["-r"], "train")


def test_ways_of_writing_arguments(tmp_path: Path) -> None:
    argv = [
        *("--model_name_or_path", "base", "--dataset=a,b", "output_dir=o", "--local-rank=1"),
        *("--packing", "--max_steps", "-1", "lora_target=[q_proj,v_proj]", "--bf16", "false"),
        *("--lora_rank", "4", "--lora_rank", "6", "--do_train", "--template", "null"),
    ]
    found = read_settings(argv, "train").to_dict()
    assert found["dataset"] == ("a", "b")
    assert found["lora_target"] == ("q_proj", "v_proj")
    assert (found["packing"], found["bf16"], found["lora_rank"]) == (True, False, 6)
    assert (found["max_steps"], found["template"], found["output_dir"]) == (-1, None, "o")


def test_flag_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(NEEDED)
    settings = read_settings(["--packing", str(tmp_path / "run.yaml")], "train")
    assert settings.data.packing is True
    assert settings.data.dataset == ("rows.json",)


def test_the_command_line_wins(tmp_path: Path) -> None:
    text = NEEDED + "lora_rank: nonsense\nlora_alpha: 3\nuse_dora: true\n"
    settings = read(
        tmp_path, text, "--lora_rank", "4", "--lora_alpha", "null", "--use_dora", "false"
    )
    assert (settings.method.lora_rank, settings.method.alpha) == (4, 8)
    assert settings.origins["lora_rank"] == "command line"
    assert settings.origins["dataset"] == f"{tmp_path / 'run.yaml'}:2"


def test_a_dash_is_an_underscore_on_the_command_line(tmp_path: Path) -> None:
    assert read(tmp_path, NEEDED, "--lora-rank", "4").method.lora_rank == 4


def test_everything_is_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    found = problems_of(
        tmp_path,
        "lora_rank: 0\nlora_rnak: 8\nfull_determinism: true\nlora_rank: 0\n"
        "quantization_type: fp4\nbf16: x\n",
        *("--learning_rate", "0", "stray", "--seed"),
    )
    expected = [
        "'stray' (command line) is not understood",
        "--seed (command line): a value is missing: --seed VALUE",
        f"lora_rank ({path}:4) stands already at {path}:1",
        f"lora_rnak ({path}:2) is not a known key",
        f"full_determinism ({path}:3): 'true' is not supported",
        f"quantization_type ({path}:5): 'fp4' is not supported",
        f"bf16 ({path}:6): 'x' is not true or false",
        f"lora_rank ({path}:4): 0 must be at least 1",
        "learning_rate (command line): 0.0 must be above 0",
        "model_name_or_path is missing: give it in the file or as --model_name_or_path VALUE",
        "dataset is missing: give it in the file or as --dataset VALUE",
        "output_dir is missing: give it in the file or as --output_dir VALUE",
    ]
    assert len(found) == len(expected)
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(start)


def test_plan_needs_only_the_model(tmp_path: Path) -> None:
    assert read_settings(["--model_name_or_path", "base"], "plan").model.model_name_or_path
    with pytest.raises(RequestError, match="^model_name_or_path is missing"):
        read_settings([], "plan")


# What takes longer to import than --help takes to print.
HEAVY = {"torch", "deepspeed", "numpy", "pydantic", "psutil", "tqdm", "matplotlib"}


@pytest.mark.slow
def test_help_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from minilora.settings.command_line import read_settings\n"
        "try:\n    read_settings(['x.yaml', '--help'], 'train')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        f"assert not {HEAVY} & {{*sys.modules}}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m minilora.train")


@pytest.mark.slow
@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--lora_rnk", "8"], 2)])
def test_help_and_wrong_settings_are_answered_before_torch_is_imported(
    words: list[str], code: int
) -> None:
    code_of_main = (
        "import sys; from minilora.train import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        f"assert not {HEAVY} & {{*sys.modules}}\n"
        "sys.exit(code)\n"
    )
    command = [sys.executable, "-c", code_of_main, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr


@pytest.mark.slow
def test_ctrl_c_while_libraries_are_imported_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    keys = ["--model_name_or_path=m", "--dataset=d", "--output_dir=o"]
    done = subprocess.run(
        [sys.executable, "-m", "minilora.train", *keys],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{tmp_path}:."},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert done.returncode == 130
    assert done.stderr == "error: SIGINT: stopped before the start\n"
