"""The figures of docs/how-it-works.md: drawn by the code as they are, and told of on both pages."""

from __future__ import annotations

import ast
import importlib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minilora.memory.block import saved_by_attention, saved_by_mlp
from minilora.plan import main as print_plan
from tests.support.commands import ROOT, commands, text_of

DOCS = ROOT / "docs"
PAGES = [DOCS / "how-it-works.md", DOCS / "how-it-works.zh-CN.md"]
CODE = [DOCS / "figures.py", *sorted((DOCS / "drawing").glob("*.py"))]
NOT_IN_A_FIGURE = {"143", "30"}  # 128 + a signal's number; the launchers' 30 seconds
PLAN = [
    str(ROOT / "examples/llama31_8b_7x4090.yaml"),
    *("--model_name_or_path", str(ROOT / "examples/llama-3.1-8b")),
    *("--num_gpus", "7", "--gpu_memory", "24", "--explain"),
]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def docs_on_path() -> Iterator[None]:
    """As when docs/figures.py is the script that runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        yield


@pytest.fixture(scope="module")
def drawn(docs_on_path: None) -> dict[str, str]:
    """All figures by their file's name, in the order of the page."""
    figures: dict[str, str] = importlib.import_module("figures").draw()
    return figures


@pytest.fixture(scope="module")
def facts(docs_on_path: None) -> Any:
    return importlib.import_module("drawing.facts")


@pytest.fixture(scope="module")
def canvas(docs_on_path: None) -> Any:
    return importlib.import_module("drawing.canvas")


def numbers(text: str) -> set[str]:
    """Numbers of two digits or more, or with decimal places, that are not part of a name."""
    found = re.findall(r"(?<![\w.,-])\d[\d,.]*\d(?![\w-])", text, re.ASCII)
    return {number for number in found if len(number) > 1}


def test_the_committed_figures_are_what_the_code_draws(drawn: dict[str, str]) -> None:
    """If this fails because a number changed: python docs/figures.py, and look at what it says."""
    there = {path.name: path.read_bytes() for path in (DOCS / "figures").iterdir()}
    assert there.keys() == drawn.keys()
    assert [name for name, svg in drawn.items() if there[name] != svg.encode("ascii")] == []


def test_every_figure_is_xml_on_opaque_paper_with_a_title(drawn: dict[str, str]) -> None:
    for name, svg in drawn.items():
        root = ElementTree.fromstring(svg)
        assert root.tag == f"{SVG}svg", name
        title, paper, *_ = root
        assert title.tag == f"{SVG}title" and title.text, name
        wanted = {**{key: root.attrib[key] for key in ("width", "height")}, "fill": "#ffffff"}
        assert wanted.items() <= paper.attrib.items(), name
        known = {f"{SVG}{tag}" for tag in ("title", "rect", "text", "polyline", "polygon")}
        assert {element.tag for element in root} <= known, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_shows_every_figure_once_in_order(page: Path, drawn: dict[str, str]) -> None:
    shown = re.findall(r"!\[([^]]+)\]\(figures/([^)]+)\)", text_of(page))
    assert [name for _, name in shown] == list(drawn)
    assert len(shown) == text_of(page).count("![")


@pytest.mark.slow
def test_every_number_of_the_pages_is_in_a_figure_or_in_the_plan(
    drawn: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--gather_tokens", "8192"]):
        assert print_plan([*PLAN, *more]) == 0
    texts = [
        element.text or "" for svg in drawn.values() for element in ElementTree.fromstring(svg)
    ]
    known = numbers(capsys.readouterr().out + "\n" + "\n".join(texts))
    told = [numbers(re.sub(r"`[^`]*`", "", text_of(page))) for page in PAGES]
    assert told[0] == told[1]
    assert told[0] - known == NOT_IN_A_FIGURE
    assert len(told[0]) > 25


def test_both_pages_have_the_same_commands_links_and_titles() -> None:
    english, chinese = PAGES
    assert commands(english) == commands(chinese)
    links = [re.findall(r"\]\(([^)]+)\)", text_of(page))[1:] for page in PAGES]
    assert links[0] == links[1]
    titles = [re.findall(r"^## (\d?)", text_of(page), re.MULTILINE) for page in PAGES]
    assert titles[0] == titles[1]


def test_what_the_figures_work_out_agrees_with_the_package(facts: Any) -> None:
    job, spans = facts.article(), facts.in_spans()
    saved = [*saved_by_attention(job), *saved_by_mlp(job)]
    assert sum(facts.block_tensors(job).values()) == sum(each.features for each in saved)
    for each in (job, spans):
        assert facts.gathers_of(each).gathered * each.size * each.spans == facts.plan(each).gathered
    moments = facts.gathers(job)
    head = max(moment.held for moment in moments if moment.name == "head")
    assert head == facts.term(job, "gathered: head") + facts.term(
        job, "gathered ahead, and buffers"
    )
    for elements in (4096 * 4096, 65536, 7, 8):
        parts = facts.partition(elements, job)
        assert sum(part.elements for part in parts) == elements
        edges = [(part.first_byte, part.end_byte) for part in parts]
        assert [end for _, end in edges[:-1]] == [start for start, _ in edges[1:]]
        assert edges[-1][1] == elements * job.size


def test_without_zero_is_the_sum_of_the_readmes_table(facts: Any) -> None:
    parts = facts.without_zero(facts.article())
    tensors = sum(size for part, size in parts.items() if part != "fixed")
    cells = re.findall(
        r"^\| [^|]+\| [\d.]+ GB \| ([\d.]+) GB \|", text_of(ROOT / "README.md"), re.M
    )
    assert len(cells) == 4
    assert tensors / 1e9 == pytest.approx(sum(map(float, cells)), abs=0.02)


@pytest.mark.parametrize("wrong", ["leaves", "too wide", "too many lines", "over", "through"])
def test_words_that_would_not_be_read_are_errors(wrong: str, canvas: Any) -> None:
    picture = canvas.Canvas("a test", 200, 100)
    picture.text(10, 50, "here")
    picture.line([(10, 60), (190, 60)])
    assert picture.svg()
    box = canvas.Area(100, 10, 60, 20)
    with pytest.raises(ValueError, match=wrong.replace("over", "lies over")):
        match wrong:
            case "leaves":
                picture.text(180, 20, "out of it")
            case "too wide":
                picture.label(box, ["wider than the box"])
            case "too many lines":
                picture.label(box, ["one", "two", "three"])
            case "over":
                picture.text(20, 52, "there")
            case _:
                picture.text(10, 64, "where the line is")
                picture.svg()


def test_the_drawing_code_keeps_the_rules_of_the_house() -> None:
    for path in CODE:
        text = text_of(path)
        assert text.isascii() and len(text.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minilora"):
                assert path.name == "facts.py", f"{path} imports {node.module}"
