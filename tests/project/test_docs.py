"""Every command, path, link, key and number of the documentation, held against what is there."""

from __future__ import annotations

import argparse
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from minilora.files.model_config import read_model_config, shape_from_config
from minilora.files.weights import read_checkpoint
from minilora.model.lora_shape import LoraShape
from minilora.settings.command_line import read_settings
from minilora.settings.foreign_keys import IGNORED, IGNORED_PREFIXES, REFUSED
from minilora.settings.settings import all_settings
from tests.support.commands import (
    EXAMPLE,
    ROOT,
    check,
    commands,
    fenced_commands,
    fences,
    parser_of,
    spans,
    text_of,
)
from tests.support.prepared import prepared_of
from tests.support.runs import make_ground

DEMO = Path("examples/demo/demo.yaml")
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
DOCS = [*READMES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are typed in the folder of run.sh."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_command_is_understood(path: Path) -> None:
    found = commands(path)
    assert found
    for command in found:
        check(command)


@pytest.mark.parametrize(
    "command",
    [
        f"deepspeed --num_gpus 7 -m minilora.train {EXAMPLE}",
        f"deepspeed --num_gpus 7 minilora.train {EXAMPLE}",
        f"deepspeed --gpus 7 --module minilora.train {EXAMPLE}",
        f"torchrun --nproc-per-node 7 minilora.train {EXAMPLE}",
        f"./run.sh train {EXAMPLE} --lora_ranks 3",
        "./run.sh train examples/nowhere.yaml",
        "./run.sh fly",
        "python -m minilora.merge --model_name_or_path DIR --adapter_name_or_path DIR",
        "python -m minilora.generate --model_name_or_path DIR --prompt a --tempo 1",
        f"python -m minilora.plan {EXAMPLE} --cards 7",
        "python -m minilora.nothing",
        "llamafactory-cli train job.yaml",
    ],
)
def test_wrong_commands_would_be_found(command: str) -> None:
    """The first one is how minilora does not start: the launcher knows no -m."""
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        check(command)


@pytest.fixture(scope="module")
def node_ids() -> list[str]:
    """Every test there is, as pytest names it."""
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert listed.returncode == 0, listed.stdout + listed.stderr
    return [line for line in listed.stdout.splitlines() if "::" in line]


def selects(words: list[str], node_ids: list[str]) -> bool:
    """Whether each path, and each alternative of -k in these paths, selects a test."""
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="*")
    parser.add_argument("-k", default="")
    parser.add_argument("-m", choices=["slow", "not slow"])
    args = parser.parse_args(words)
    paths = tuple(args.paths) or ("tests/",)
    names = [node.partition("::")[2] for node in node_ids if node.startswith(paths)]
    return all(any(node.startswith(path) for node in node_ids) for path in paths) and all(
        any(part in name for name in names) for part in args.k.split(" or ")
    )


def test_every_selection_of_tests_selects_some(node_ids: list[str]) -> None:
    words = [shlex.split(command) for path in DOCS for command in commands(path)]
    selections = [line[line.index("test") + 1 :] for line in words if "test" in line]
    assert [each for each in selections if not selects(each, node_ids)] == []
    assert not selects(["tests/model/test_loss.py", "-k", "kill_9"], node_ids)
    assert not selects(["tests/test_losses.py"], node_ids)


def test_both_readmes_have_the_same_commands() -> None:
    english, chinese = READMES
    assert commands(english) == commands(chinese)
    assert [body for kind, body in fences(text_of(english)) if kind == "text"] == [
        body for kind, body in fences(text_of(chinese)) if kind == "text"
    ]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_and_paths_lead_somewhere(path: Path) -> None:
    text = text_of(path)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles}
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://"):
            assert (path.parent / link).exists(), link
    words = [word for line in (*spans(text), *fenced_commands(text)) for word in line.split()]
    for word in words:
        if word.startswith(("minilora/", "tests/", "examples/", "docs/", "benchmarks/")):
            assert list(ROOT.glob(word.split("::")[0].rstrip("/"))), word


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_options_in_the_text_exist(path: Path) -> None:
    known = {f"--{item.name}" for _, item in all_settings()} | {"--module"}
    for module in ("minilora.generate", "minilora.merge", "minilora.plot", "minilora.preview",
                   "minilora.plan"):  # fmt: skip
        known |= set(parser_of(module)._option_string_actions)
    for span in spans(text_of(path)):
        if span.startswith("--"):
            assert {word for word in span.split() if word.startswith("--")} <= known, span


def rows(path: Path) -> list[list[str]]:
    """Of each table row whose second cell is nothing but keys: these keys."""
    found = re.findall(r"^\|[^|]+\| ((?:`\w+`(?:,? |))+)\|$", text_of(path), re.MULTILINE)
    return [re.findall(r"\w+", cell) for cell in found]


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_every_setting_is_listed_once(path: Path) -> None:
    listed = [key for row in rows(path)[2:] for key in row]
    assert sorted(listed) == sorted(item.name for _, item in all_settings())
    ours = {item.name for _, item in all_settings() if item.metadata["help"].startswith("Ours")}
    assert set(rows(path)[-1]) == ours


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_other_keys_have_the_fate_that_is_told(path: Path) -> None:
    ignored, refused = rows(path)[:2]
    assert all(key in IGNORED or key.startswith(IGNORED_PREFIXES) for key in ignored)
    assert set(refused) <= REFUSED.keys()


@cache
def sums() -> dict[str, float]:
    """The figures of the article's job, by how they are written."""
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


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_figures_are_those_of_the_tests_and_settings(path: Path) -> None:
    text, demo = text_of(path), text_of(ROOT / "examples" / "demo" / "demo.yaml")
    sources = {
        name: text_of(ROOT / "tests" / f"{name}.py")
        for name in ("runs", "test_distributed", "test_resume")
    }
    assert " 1.9 " in text and "ratio <= 1.9 " in sources["test_distributed"]
    assert "1/N + 1 %" in text and "<= 1.01 * total / ranks" in sources["runs"]
    assert "| 60/60 [" in text and "max_steps: 60\n" in demo
    assert "1,024" in text and "`logging_steps`" in text
    defaults = {item.name: item.default for _, item in all_settings()}
    assert defaults["loss_tokens"] == 1024 and defaults["logging_steps"] == 10
    package = sum(len(text_of(file).splitlines()) for file in (ROOT / "minilora").rglob("*.py"))
    (told,) = re.findall(r"(\d,\d00)[^\n]* Python", text)
    assert int(told.replace(",", "")) == pytest.approx(package, rel=0.1)
    reliability = text_of(ROOT / "docs" / "reliability.md")
    assert "agree to 1e-5" in reliability and "rel=1e-5)\n" in sources["test_resume"]
    assert "MINILORA_KILLS=20" in reliability and '"MINILORA_KILLS"' in sources["test_resume"]


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_the_predicted_memory_is_what_the_plan_says(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = [line for line in fenced_commands(text_of(path)) if "minilora.plan" in line]
    assert importlib.import_module("minilora.plan").main(shlex.split(command)[3:]) == 0
    output = capsys.readouterr().out
    told = re.findall(r"[\d.]+ GiB", text_of(path).split(command)[1].split("\n\n")[1])
    usable, peak = (
        re.findall(pattern, output)[0]
        for pattern in (r"which (\S+ GiB) can", r"peak of a GPU.* (\S+ GiB)")
    )
    assert sorted(told) == sorted([usable, peak])


def test_the_demo_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that a newcomer types, after a tiny checkpoint and an adapter; and the demo's facts."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "outputs" / "tiny"
    assert importlib.import_module("minilora.tiny").main([str(model)]) == 0
    ground = make_ground(tmp_path, {"demo": model})
    ground.adapters["demo"].rename(tmp_path / "outputs" / "demo")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "prompts.txt").write_text("What is a tile?\n", encoding="utf-8")
    ran = []
    for command in fenced_commands(text_of(READMES[0])):
        words: Sequence[str] = shlex.split(command)
        if words[:2] != ["python", "-m"] or not {"outputs/tiny", str(DEMO), "outputs/demo"} & {
            *words
        }:
            continue
        ran.append(words[2])
        if words[2] == "minilora.train":
            done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
            assert done.returncode == 0 and "best: step " in done.stderr, done.stderr
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
    (lengths,) = [body for _, body in fences(text_of(READMES[0])) if "so far" in body]
    assert lengths in capsys.readouterr().out
    total = read_checkpoint(read_model_config(model)).total_bytes / 1e9
    settings = read_settings(["examples/demo/demo.yaml"], "train")
    for fact in (f"read {total / 2:.4g} of {total:.4g} GB", prepared_of(settings).summary):
        assert fact in text_of(READMES[0])
