"""From files and command lines to settings: LLaMA-Factory's ways of writing them, broken files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minilora.settings.command_line import read_settings
from minilora.settings.errors import RequestError
from minilora.settings.settings import (
    DataSettings,
    MethodSettings,
    ModelSettings,
    Settings,
    TrainSettings,
)

NEEDED = "model_name_or_path: base\ndataset: rows.json\noutput_dir: out\n"

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


def read(tmp_path: Path, text: str, *argv: str, name: str = "run.yaml") -> Settings:
    """The settings of a file with this text, and of these arguments after it."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_settings([str(tmp_path / name), *argv], "train")


def problems_of(tmp_path: Path, text: str, *argv: str, name: str = "run.yaml") -> tuple[str, ...]:
    with pytest.raises(RequestError) as caught:
        read(tmp_path, text, *argv, name=name)
    return caught.value.problems


# Text of a file -> (its name, what the one message must say).
BROKEN_FILES = {
    "": ("run.yaml", "run.yaml: empty: no settings; write one `key: value` per line"),
    "# only a comment\n": ("run.yaml", "run.yaml: empty: no settings"),
    "just words": ("run.yaml", "run.yaml: not settings; write one `key: value` per line"),
    "- lora_rank\n": ("run.yaml", "run.yaml: not settings"),
    "a: 1\nb: [1,\n": ("run.yaml", "run.yaml:3: not YAML"),
    "a: 1\n\tb: 2\n": ("run.yaml", "run.yaml:2: not YAML"),
    "a: b: c\n": ("run.yaml", "run.yaml:1: not YAML"),
    "a: 1\n---\nb: 2\n": ("run.yaml", "not YAML"),
    "a: &x [*x]\n": ("run.yaml", "not YAML"),
    "a: \x07\n": ("run.yaml", "not YAML"),
    "a: " + "[" * 5000: ("run.yaml", "nested too deeply"),
    " ": ("run.json", "run.json:1: not JSON"),
    '{\n"a": 1,\n}': ("run.json", "run.json:3: not JSON"),
    "[1]": ("run.json", "run.json: not settings"),
    '{"a":' + "[" * 200000: ("run.json", "nested too deeply"),
}


@pytest.mark.parametrize("text", BROKEN_FILES, ids=lambda text: repr(text[:12]))
def test_broken_file(tmp_path: Path, text: str) -> None:
    name, message = BROKEN_FILES[text]
    (problem,) = problems_of(tmp_path, text, name=name)
    assert problem.startswith(str(tmp_path / name))
    assert message in problem


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"dataset: caf\xe9\n")
    cases = {
        "missing.yaml": "No such file or directory; check the path",
        ".": "Is a directory; check the path",
        "latin.yaml": "not UTF-8 text; check the path",
        "a\0b.yaml": "check the path",
    }
    for name, message in cases.items():
        with pytest.raises(RequestError) as caught:
            read_settings([f"{tmp_path}/{name}", "--lora_rank", "0"], "train")
        first, second = caught.value.problems
        assert first.startswith(f"{tmp_path}/{name}: cannot read the settings: ")
        assert message in first
        assert second == "lora_rank (command line): 0 must be at least 1"


def test_twice_in_json(tmp_path: Path) -> None:
    text = '{"seed": 1, "model_name_or_path": "m", "dataset": "d", "output_dir": "o", "seed": 2}'
    (problem,) = problems_of(tmp_path, text, name="run.json")
    assert problem == f"seed ({tmp_path / 'run.json'}) stands there more than once"


@pytest.mark.parametrize("word", ["second.yaml", "-x", "-lora_rank", "--", "=", "a/b=c"])
def test_stray_words(tmp_path: Path, word: str) -> None:
    (problem,) = problems_of(tmp_path, NEEDED, word)
    assert problem.startswith(f"{word!r} (command line) is not understood: write --key value")


def test_an_option_with_one_dash_is_no_file() -> None:
    with pytest.raises(RequestError, match="^'-r' .command line. is not understood"):
        read_settings(["-r"], "train")


def test_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    text = '{"model_name_or_path": "base", "dataset": "d", "output_dir": "o"}'
    assert read(tmp_path, "\ufeff" + NEEDED).model.model_name_or_path == "base"
    assert read(tmp_path, "\ufeff" + text, name="run.json").model.model_name_or_path == "base"


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
    keys = "include_num_input_tokens_seen, preprocessing_num_workers, trust_remote_code"
    assert settings.notices == (f"ignored, they mean nothing here: {keys}",)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate: 5e-5", "learning_rate", 5e-5),
        ("learning_rate: 1.0E-4", "learning_rate", 1e-4),
        ("learning_rate: '5e-5'", "learning_rate", 5e-5),
        ("num_train_epochs: 3", "num_train_epochs", 3.0),
        ("max_samples: 1e5", "max_samples", 100000),
        ("save_steps: 500.0", "save_steps", 500),
        ("max_samples: 100_000", "max_samples", 100000),
        ("save_strategy: no", "save_strategy", "no"),
        ("bf16: yes", "bf16", True),
        ("bf16: False", "bf16", False),
        ("packing: on", "packing", True),
        ("lora_alpha:", "lora_alpha", None),
        ("lora_alpha: null", "lora_alpha", None),
        ("template: ~", "template", None),
        ("template: 'null'", "template", "null"),
        ("seed: null", "seed", 42),
        ("default_system: yes", "default_system", "yes"),
        ("default_system: |\n  two\n  lines", "default_system", "two\nlines"),
        ("lora_target: q_proj,v_proj", "lora_target", ("q_proj", "v_proj")),
        ("lora_target: q_proj, v_proj,", "lora_target", ("q_proj", "v_proj")),
        ("lora_target: [q_proj, v_proj]", "lora_target", ("q_proj", "v_proj")),
        ("lora_target:\n- q_proj\n- v_proj", "lora_target", ("q_proj", "v_proj")),
        ("neat_packing: true", "packing", True),
        ("neat_packing: false", "packing", None),
    ],
)
def test_yaml_means_what_llama_factory_takes_it_for(
    tmp_path: Path, text: str, key: str, value: object
) -> None:
    found = read(tmp_path, NEEDED + text).to_dict()[key]
    assert (type(found), found) == (type(value), value)


def test_json_file(tmp_path: Path) -> None:
    text = json.dumps(
        {
            "model_name_or_path": "base",
            "dataset": ["a.json", "b"],
            "output_dir": "o",
            "bf16": True,
            "packing": False,
            "lora_alpha": None,
            "learning_rate": 1e-4,
            "max_samples": 10,
        },
        indent="\t",
    )
    found = read(tmp_path, text, name="run.json").to_dict()
    assert found["dataset"] == ("a.json", "b")
    assert (found["bf16"], found["packing"], found["lora_alpha"]) == (True, False, None)
    assert (found["learning_rate"], found["max_samples"]) == (1e-4, 10)


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


def test_help_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from minilora.settings.command_line import read_settings\n"
        "try:\n    read_settings(['x.yaml', '--help'], 'train')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=20
    )
    assert done.stdout.startswith("usage: python -m minilora.train")


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--lora_rnk", "8"], 2)])
def test_help_and_wrong_settings_are_answered_before_torch_is_imported(
    words: list[str], code: int
) -> None:
    check = "import sys; from minilora.train import main\ntry: code = main(sys.argv[1:])\n"
    check += "except SystemExit as end: code = end.code\n"
    check += "assert not {'torch', 'deepspeed', 'numpy'} & {*sys.modules}; sys.exit(code)"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", check, *words], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert time.monotonic() - started < 2  # 0.12 s on a machine with nothing else to do


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
