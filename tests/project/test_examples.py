"""The examples and the shipped DeepSpeed files, read by those who will read them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from minilora.files.deepspeed_file import SHIPPED, find_ds_config
from minilora.settings.command_line import read_settings
from minilora.tiny.__main__ import main as write_demo_checkpoint
from tests.support.prepared import prepared_of
from tests.support.processes import Launch
from tests.support.runs import check_output

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = ("zero0", "zero2", "zero3", "zero3_nodes", "zero3_offload")


def shipped(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(find_ds_config(name).read_text())
    return config


def all_keys(node: dict[str, Any]) -> set[str]:
    return set(node).union(*(all_keys(part) for part in node.values() if isinstance(part, dict)))


@pytest.mark.parametrize(
    ("config", "dataset_dir", "rows", "held_out"),
    [
        ("llama31_8b_7x4090.yaml", "examples/data", 8, 0),
        ("llama31_70b_7x4090.yaml", "examples/data", 8, 0),
        ("qwen3_8b_7x4090.yaml", "examples/data", 8, 0),
        ("recommended.yaml", "examples/data", 8, 1),
        ("demo/demo.yaml", "examples/demo", 24, 0),
    ],
)
def test_examples_need_no_change(
    tiny: Path, config: str, dataset_dir: str, rows: int, held_out: int
) -> None:
    path = str(ROOT / "examples" / config)
    assert read_settings([path], "train").data.dataset_dir == dataset_dir
    there = ["--model_name_or_path", str(tiny), "--dataset_dir", str(ROOT / dataset_dir)]
    prepared = prepared_of(read_settings([path, *there], "train"))
    assert prepared.summary.startswith(f"{rows} rows used, 0 dropped; {rows - held_out} doc")


def test_the_7x4090_example_is_the_job_as_it_was_posted() -> None:
    settings = read_settings([str(ROOT / "examples" / "llama31_8b_7x4090.yaml")], "train").to_dict()
    wanted = {
        "lora_rank": 16,
        "lora_alpha": 16,
        "lora_dropout": 0,
        "lora_target": ("all",),
        "template": "llama3",
        "cutoff_len": 2048,
        "packing": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "num_train_epochs": 30,
        "max_grad_norm": 1.0,
        "bf16": True,
        "save_steps": 1000,
        "logging_steps": 5,
        "plot_loss": True,
        "max_samples": 100000,
        "dataset": ("uspto50k_canonical_smiles",),
        "ddp_timeout": 180000000,
        "deepspeed": "zero3",
    }
    assert {key: settings[key] for key in wanted} == wanted


@pytest.mark.parametrize("name", FILES)
def test_every_value_has_its_reason(name: str) -> None:
    text = (SHIPPED / "README.md").read_text(encoding="utf-8")
    leaves = all_keys(shipped(name)) - {"zero_optimization", "bf16", "enabled", "stage"}
    assert {key for key in leaves if f"{key}`" not in text} == {"device", "pin_memory"} & leaves
    for key, value in shipped(name)["zero_optimization"].items():
        if isinstance(value, int) and value > 1000:
            assert f"`{key}`" in text and f"{value:,}" in text, key


@pytest.mark.parametrize("name", FILES)
def test_no_file_states_the_global_batch(name: str) -> None:
    assert "train_batch_size" not in shipped(name)


@pytest.mark.parametrize("name", FILES)
def test_the_trainer_fills_them_in(name: str, tiny: Path, tmp_path: Path) -> None:
    # Before the configuration exists, which would make transformers split the model at once.
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=5
    )
    config = HfTrainerDeepSpeedConfig(shipped(name))
    config.trainer_config_process(arguments)
    config.trainer_config_finalize(arguments, model, num_training_steps=10)
    # The Trainer knows no "auto" for the second partition, which ds_configs/README.md says.
    left = config.config["zero_optimization"].pop("zero_hpz_partition_size", None)
    assert left == ("auto" if name == "zero3_nodes" else None)
    assert "auto" not in json.dumps(config.config)
    assert config.config["train_micro_batch_size_per_gpu"] == 3
    assert config.config["gradient_accumulation_steps"] == 5


@pytest.mark.slow
def test_the_demo_learns_its_answers(tmp_path: Path, launch: Launch) -> None:
    rows = json.loads((ROOT / "examples" / "demo" / "about_minilora.json").read_text("utf-8"))
    model, adapter = str(tmp_path / "tiny"), str(tmp_path / "out")
    assert write_demo_checkpoint([model]) == 0
    ask = ["-m", "minilora.generate", "--model_name_or_path", model, "--temperature", "0"]
    chosen = [row for row in rows if not row.keys() & {"system", "history"}]
    chosen = [*chosen[:3], chosen[-1]]
    prompts = ["\n".join(filter(None, (row["instruction"], row["input"]))) for row in chosen]
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    ask += ["--prompts", tmp_path / "prompts.jsonl"]

    def answers(*more: str) -> list[str]:
        """All of them from one process, as a file of prompts is answered."""
        written = tmp_path / f"answers{more[0]}.jsonl"
        code, output = launch(1, [*ask, "--output", written, *more], with_="alone")
        assert code == 0, output
        lines = written.read_text("utf-8").splitlines()
        return [json.loads(line)["predict"].strip() for line in lines]

    wanted = [row["output"] for row in chosen]
    assert not {*answers("--max_new_tokens", "30")} & {*wanted}
    paths = ["--dataset_dir", ROOT / "examples" / "demo", "--output_dir", adapter]
    job = ["-m", "minilora.train", ROOT / "examples" / "demo" / "demo.yaml", *paths]
    code, output = launch(2, [*job, "--model_name_or_path", model], with_="minilora")
    assert code == 0, output
    check_output(output, "ZeRO-3 on 2 x cpu", "blocks keep their activations")
    assert answers("--adapter_name_or_path", adapter) == wanted
    assert (tmp_path / "out" / "training_loss.png").is_file()


def test_shipped_files_are_these() -> None:
    names = {entry.name for entry in SHIPPED.iterdir()}
    assert names == {f"{name}.json" for name in FILES} | {"README.md"}
