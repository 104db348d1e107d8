"""Every key, sum, predicted figure and printed line of the documentation, held against the code."""

from __future__ import annotations

import importlib
import io
import re
import shlex
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from minilora.files.model_config import read_model_config, shape_from_config
from minilora.files.weights import read_checkpoint
from minilora.memory.peak import CONTEXT, GIB, NCCL, SLACK
from minilora.model.lora_shape import LoraShape
from minilora.settings.command_line import read_settings
from minilora.settings.foreign_keys import IGNORED, IGNORED_PREFIXES, REFUSED
from minilora.settings.settings import all_settings
from tests.support.commands import (
    CONTRIBUTING,
    PROMISES,
    READMES,
    ROOT,
    SETTINGS,
    fenced_commands,
    fences,
    text_of,
)
from tests.support.prepared import prepared_of
from tests.support.processes import Launch
from tests.support.runs import make_ground

DEMO = Path("examples/demo/demo.yaml")


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are typed in the folder of run.sh."""
    monkeypatch.chdir(ROOT)


def rows(path: Path) -> list[list[str]]:
    """Of each table row whose second cell is nothing but keys: these keys."""
    found = re.findall(r"^\|[^|]+\| ((?:`\w+`(?:,? |))+)\|$", text_of(path), re.MULTILINE)
    return [re.findall(r"\w+", cell) for cell in found]


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.name)
def test_every_setting_is_listed_once(path: Path) -> None:
    listed = [key for row in rows(path) for key in row]
    assert sorted(listed) == sorted(item.name for _, item in all_settings())
    ours = {item.name for _, item in all_settings() if item.metadata["help"].startswith("Ours")}
    assert set(rows(path)[-1]) == ours


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_other_keys_have_the_fate_that_is_told(path: Path) -> None:
    ignored, refused = rows(path)
    assert all(key in IGNORED or key.startswith(IGNORED_PREFIXES) for key in ignored)
    assert set(refused) <= REFUSED.keys()


@cache
def sums() -> dict[str, float]:
    """The figures of the question's job, by how they are written."""
    shape = shape_from_config(
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        }
    )
    sizes = {
        name: rows * (more or [1])[0] for name, (rows, *more) in shape.parameter_shapes().items()
    }
    weights = sum(sizes.values())
    block = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    lora = LoraShape(16, 16, 0.0, tuple(shape.linear_shapes())).size(shape)
    logits = 4 * 2048 * 128256
    return {
        "8,030,261,248": weights,
        "16.06 GB": 2 * weights / 1e9,
        "2.29 GB": 2 * weights / 7 / 1e9,
        "0.44 GB": 2 * block / 1e9,
        "41,943,040": lora,
        "0.67 GB": 16 * lora / 1e9,
        "bf16 2.10": 2 * logits / 1e9,
        "fp32 4.20": 4 * logits / 1e9,
        "10.51 GB": 10 * logits / 1e9,
        "0.53 GB": 4 * 1024 * 128256 / 1e9,
        "2.15 GB": 32 * 4 * 2048 * 4096 * 2 / 1e9,
        "8.59 GB": 32 * 16 * 2048 * 4096 * 2 / 1e9,
    }


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_the_sums_are_right(path: Path) -> None:
    for written, value in sums().items():
        assert written in text_of(path), written
        number = float(re.sub(r"bf16|fp32|GB|,", "", written))
        assert number == pytest.approx(value, abs=0.005), written
    others = {"1 GB", "5 GB", "24 GB", "0.001444 GB"}
    assert set(re.findall(r"[\d.]+ GB", text_of(path))) <= sums().keys() | others


def test_figures_are_those_of_the_tests_and_settings() -> None:
    partitioning, resumes, runs, style = (
        text_of(ROOT / "tests" / f"{name}.py")
        for name in (
            "promises/test_partitioning",
            "promises/test_resumes",
            "support/runs",
            "project/test_style",
        )
    )
    demo = text_of(ROOT / "examples" / "demo" / "demo.yaml")
    defaults = {item.name: item.default for _, item in all_settings()}
    for path in (*READMES, *PROMISES):
        text = text_of(path)
        assert " 1.9 " in text and "ratio <= 1.9 " in partitioning
        assert "1/N + 1 %" in text and "<= 1.01 * total / parts" in runs
    for path in READMES:
        text = text_of(path)
        assert "| 60/60 [" in text and "max_steps: 60\n" in demo
        assert "1,024" in text and defaults["loss_tokens"] == 1024
        assert "`logging_steps`" in text and defaults["logging_steps"] == 10
    for path in (*READMES, CONTRIBUTING):
        assert "3,200" in text_of(path) and "HEART_LINES = 3200" in style
    for path in PROMISES:
        text = text_of(path)
        assert "1e-5" in text and "rel=1e-5)\n" in resumes
        assert "MINILORA_KILLS=20" in text and '"MINILORA_KILLS"' in resumes


def without_zero() -> float:
    """GiB of the question's job when every GPU holds the whole model, as the README adds it up.

    LoRA's value, gradient and two moments in fp32; the logits in bf16, in fp32, and their gradient.
    """
    told = ("16.06 GB", "0.67 GB", "10.51 GB", "2.15 GB")
    tensors = sum(sums()[written] for written in told) * 1e9
    return (tensors * (1 + SLACK) + CONTEXT + NCCL) / GIB


@pytest.mark.slow
@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_the_predicted_memory_is_what_the_plan_says(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = text_of(path)
    (command,) = [line for line in fenced_commands(text) if "minilora.plan" in line]

    def planned(*more: str, model: str = "8b") -> list[str]:
        words = [word.replace("8b", model) for word in shlex.split(command)[3:]] + [*more]
        assert importlib.import_module("minilora.plan").main(words) == 0
        output = capsys.readouterr().out
        wanted = (r"which (\S+ GiB) can", r"peak of a GPU.* (\S+ GiB)")
        return [re.findall(pattern, output)[0] for pattern in wanted]

    (usable, peak), (_, in_spans) = planned(), planned("--gather_tokens", "8192")
    assert "`--gather_tokens 8192`" in text
    told = [f"{without_zero():.2f} GiB", usable, peak, in_spans]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"[\d.]+ GiB", prose)
    if "70B" in text:  # examples/llama31_70b_7x4090.yaml on the same cards
        found.remove(planned(model="70b")[1])
    assert sorted(found) == sorted(told)
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert all(number.removesuffix(" GiB") in text_of(ROOT / picture) for number in told)


@pytest.mark.slow
def test_the_demo_commands_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    launch: Launch,
) -> None:
    """All that a newcomer types, after a tiny checkpoint and an adapter; and the demo's facts."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "outputs" / "tiny"
    assert importlib.import_module("minilora.tiny.__main__").main([str(model)]) == 0
    ground = make_ground(tmp_path, {"demo": model})
    ground.adapters["demo"].rename(tmp_path / "outputs" / "demo")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "prompts.txt").write_text("What is a tile?\n", encoding="utf-8")
    ran = []
    both = [line for path in (READMES[0], SETTINGS[0]) for line in fenced_commands(text_of(path))]
    for command in dict.fromkeys(both):
        words: Sequence[str] = shlex.split(command)
        if words[:2] != ["python", "-m"] or not {"outputs/tiny", str(DEMO), "outputs/demo"} & {
            *words
        }:
            continue
        ran.append(words[2])
        if words[2] == "minilora.train":
            code, output = launch(1, words[1:], with_="alone")
            assert code == 0 and "best: step " in output, output
            log = tmp_path / "outputs" / "best" / "trainer_log.jsonl"
            shutil.copy(log, tmp_path / "outputs" / "demo")  # its run was not done here
        else:
            monkeypatch.setattr("sys.stdin", io.StringIO("exit\n"))
            assert importlib.import_module(words[2]).main(words[3:]) == 0, command
    commands_run = {"train", "plot", "preview", "generate", "merge"}
    assert {name.removeprefix("minilora.") for name in ran} == commands_run
    for made in ("demo-merged/config.json", "demo-served/adapter_config.json", "runs.png"):
        assert (tmp_path / "outputs" / made).exists()
    assert (tmp_path / "answers.jsonl").exists()
    capsys.readouterr()
    assert importlib.import_module("minilora.preview").main([str(DEMO)]) == 0
    (lengths,) = [body for _, body in fences(text_of(SETTINGS[0])) if "so far" in body]
    assert lengths in capsys.readouterr().out
    total = read_checkpoint(read_model_config(model)).total_bytes / 1e9
    settings = read_settings(["examples/demo/demo.yaml"], "train")
    for fact in (f"read {total / 2:.4g} of {total:.4g} GB", prepared_of(settings).summary):
        assert fact in text_of(READMES[0])
