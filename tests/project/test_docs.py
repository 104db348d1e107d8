"""Every command, path, link, option and promise of the documentation, held against the code."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from minilora.settings.settings import all_settings
from tests.support.collected import all_node_ids
from tests.support.commands import (
    CHINESE,
    COMMAND,
    CONTRIBUTING,
    DOCS,
    EXAMPLE,
    PROMISES,
    READMES,
    ROOT,
    SETTINGS,
    check,
    commands,
    fenced_commands,
    fences,
    parser_of,
    spans,
    tables,
    text_of,
)

README_LINES = 230


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are typed in the folder of run.sh."""
    monkeypatch.chdir(ROOT)


@pytest.mark.slow
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
        "minilora fly",
        f"minilora train {EXAMPLE} --cards 7",
        "python -m minilora.merge --model_name_or_path DIR --adapter_name_or_path DIR",
        "python -m minilora.generate --model_name_or_path DIR --prompt a --tempo 1",
        f"python -m minilora.plan {EXAMPLE} --cards 7",
        "python docs/nothing.py",
        "python -m minilora.nothing",
        "llamafactory-cli train job.yaml",
    ],
)
def test_wrong_commands_would_be_found(command: str) -> None:
    """The first one is how minilora does not start: the launcher knows no -m."""
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        check(command)


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


@pytest.mark.slow
def test_every_selection_of_tests_selects_some(pytestconfig: pytest.Config) -> None:
    node_ids = all_node_ids(pytestconfig)
    words = [shlex.split(command) for path in DOCS for command in commands(path)]
    selections = [line[line.index("test") + 1 :] for line in words if "test" in line]
    assert [each for each in selections if not selects(each, node_ids)] == []
    assert not selects(["tests/model/test_loss.py", "-k", "kill_9"], node_ids)
    assert not selects(["tests/test_losses.py"], node_ids)


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_the_readme_is_short(path: Path) -> None:
    assert len(text_of(path).splitlines()) < README_LINES


def test_translations_have_the_same_commands() -> None:
    translated = [path for path in DOCS if path.name.endswith(CHINESE)]
    assert {READMES[1], PROMISES[1], SETTINGS[1]} <= {*translated}
    for chinese in translated:
        english = chinese.with_name(chinese.name.replace(CHINESE, ".md"))
        assert commands(english) == commands(chinese), chinese.name
        assert [body for kind, body in fences(text_of(english)) if kind == "text"] == [
            body for kind, body in fences(text_of(chinese)) if kind == "text"
        ]


def promises(path: Path) -> list[tuple[str, str]]:
    """Each row of the tables of promises: what is promised, and what shows it."""
    found = [table for table in tables(text_of(path)) if table[0][0] in ("promise", "\u627f\u8bfa")]
    return [(row[0], row[-1]) for table in found for row in table[1:]]


@pytest.mark.parametrize("path", [*READMES, *PROMISES], ids=lambda path: path.name)
def test_every_promise_has_a_command(path: Path) -> None:
    assert promises(path)
    for promise, shown in promises(path):
        (command,) = re.findall(r"^`([^`]+)`$", shown) or [""]
        assert COMMAND.fullmatch(command), promise
        check(command)


@pytest.mark.parametrize(
    ("short", "whole"), [*zip(READMES, PROMISES, strict=True)], ids=lambda path: path.name
)
def test_the_readme_has_ten_of_the_promises(short: Path, whole: Path) -> None:
    ten = {shown for _, shown in promises(short)}
    assert len(promises(short)) == len(ten) == 10
    assert ten < {shown for _, shown in promises(whole)}


def anchors_of(path: Path) -> set[str]:
    """What a link to a heading of this document may say after the #."""
    titles = re.findall(r"^#+ (.*)$", text_of(path), re.MULTILINE)
    return {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles}


@pytest.mark.parametrize("path", [*DOCS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_and_paths_lead_somewhere(path: Path) -> None:
    text = text_of(path)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), link
            assert not anchor or anchor in anchors_of(target), link
    words = [word for line in (*spans(text), *fenced_commands(text)) for word in line.split()]
    folders = ("minilora/", "tests/", "examples/", "docs/", "benchmarks/", "ds_configs/")
    for word in words:
        if word.startswith(folders):
            assert list(ROOT.glob(word.split("::")[0].rstrip("/"))), word


def test_contributing_names_every_folder_of_the_package_and_of_the_tests() -> None:
    named = {span.rstrip("/") for span in spans(text_of(CONTRIBUTING)) if span.endswith("/")}
    for top in ("minilora", "tests"):
        there = {f"{top}/{init.parent.name}" for init in (ROOT / top).glob("*/__init__.py")}
        assert there and there <= named, there - named


def test_recipes_name_what_is_there() -> None:
    """Each file exists, and each function, class and constant stands in a file of its recipe."""
    after = text_of(CONTRIBUTING).partition("\n## Five recipes\n")[2]
    recipes = after.split("\n### ")[1:]
    assert len(recipes) == 5
    for recipe in recipes:
        named = [span.removesuffix("()") for span in spans(recipe)]
        files = [ROOT / span for span in named if span.endswith(".py")]
        assert any("tests" in file.parts for file in files), recipe
        sources = "\n".join(map(text_of, files))
        for name in named:
            if name.isidentifier():
                assert re.search(rf"\b{name}\b", sources), f"{recipe.splitlines()[0]}: {name}"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_options_in_the_text_exist(path: Path) -> None:
    known = {f"--{item.name}" for _, item in all_settings()} | {"--module"}
    for module in ("minilora.generate", "minilora.merge", "minilora.plot", "minilora.preview",
                   "minilora.plan"):  # fmt: skip
        known |= set(parser_of(module)._option_string_actions)
    for span in spans(text_of(path)):
        if span.startswith("--"):
            assert {word for word in span.split() if word.startswith("--")} <= known, span
