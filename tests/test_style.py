"""The house rules of CONTRIBUTING.md, held by looking at the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "minilora").rglob("*.py"))
SOURCES = [*PACKAGE, *sorted((ROOT / "tests").rglob("*.py"))]

FLOORS = ("ground", "files", "run", "commands")
# The floor of each folder; files of the package's own folder are commands.
FOLDERS = {"config": "ground", "model": "ground", "data": "ground", "files": "files", "run": "run"}

# Model, LoRA, recomputation, loss, loading, batches, engine and loop: what is written by hand here
# because it is what the project is for.
HEART = {
    f"minilora/{name}.py"
    for name in """
    model/attention model/dropout model/linear model/llama model/lora model/lora_shape model/loss
    model/offload model/recompute model/rope model/shape model/swiglu model/tiles
    files/weights data/batches data/schedule run/engine run/learning_rate run/loop
    """.split()
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def floor_of(module: str) -> int:
    """The floor of a module of the package, 0 being the lowest."""
    inner = module.split(".")[1:2]
    if not inner:
        return FLOORS.index("ground")
    return FLOORS.index(FOLDERS.get(inner[0], "commands"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported module anywhere in a file, as absolute dotted name and line."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            assert node.module
            # `from torch import nn` imports torch.nn.
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("path", PACKAGE, ids=module_of)
def test_imports_go_down_or_sideways(path: Path) -> None:
    floor = floor_of(module_of(path))
    for name, line in imports(path):
        if within(name, "minilora"):
            assert floor_of(name) <= floor, f"{path}:{line}: {FLOORS[floor]} imports {name}"


@pytest.mark.parametrize("path", PACKAGE, ids=module_of)
def test_who_may_import_what(path: Path) -> None:
    module = module_of(path)
    for name, line in imports(path):
        where = f"{path}:{line}: {name}"
        assert not within(name, "transformers", "peft", "accelerate"), where
        if within(name, "deepspeed"):
            assert module == "minilora.run.engine", f"{where}: only run/engine.py knows DeepSpeed"
        if within(module, "minilora.data"):
            assert not within(name, "torch.nn"), f"{where}: data knows no layers"
        if within(module, "minilora.model"):
            ours = within(name, "torch", "minilora.config", "minilora.model")
            assert ours or name.split(".")[0] in sys.stdlib_module_names, f"{where}: torch alone"


@pytest.mark.parametrize("path", PACKAGE, ids=module_of)
def test_nothing_happens_at_import(path: Path) -> None:
    tree = parse(path)
    assert ast.get_docstring(tree), f"{path}: says nothing about itself"
    for inner in ast.walk(tree):
        assert not isinstance(inner, ast.Global), f"{path}:{inner.lineno}: global"
    for node in tree.body[1:]:
        where = f"{path}:{node.lineno}"
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                # CONSTANT, TypeAlias or __dunder__: a lower-case name would be a variable.
                for name in ast.unparse(target).strip("()").split(", "):
                    assert name.lstrip("_")[0].isupper() or name.startswith("__"), (
                        f"{where}: {name}"
                    )
        elif isinstance(node, ast.If):
            test = ast.unparse(node.test)
            assert test in ("__name__ == '__main__'", "TYPE_CHECKING"), f"{where}: if {test}"
        else:
            assert isinstance(node, ast.Import | ast.ImportFrom | Function | ast.ClassDef), where


@pytest.mark.parametrize("path", PACKAGE, ids=module_of)
def test_functions_are_short(path: Path) -> None:
    for node in functions(path):
        assert node.end_lineno is not None
        lines = node.end_lineno - node.lineno + 1
        assert lines <= 60, f"{path}:{node.lineno}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", PACKAGE, ids=module_of)
def test_functions_take_few_parameters(path: Path) -> None:
    for node in functions(path):
        names = [part.arg for part in [*node.args.posonlyargs, *node.args.args]]
        names += [part.arg for part in node.args.kwonlyargs]
        names = [name for name in names if name not in ("self", "cls")]
        where = f"{path}:{node.lineno}: {node.name}"
        assert len(names) <= 6, f"{where} has {len(names)} parameters: make a dataclass"


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    long = {str(path): length for path, length in lengths.items() if length > 300}
    assert not long


def test_package_is_short() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE}
    heart = sum(count for path, count in lines.items() if str(path.relative_to(ROOT)) in HEART)
    # What is to be read in an afternoon keeps the promise that was made for all of it.
    assert heart <= 3000, f"the heart of the package has {heart} lines"
    # Today's size; a change that lengthens it has to earn its lines.
    assert sum(lines.values()) <= 9200, f"the package has {sum(lines.values())} lines"


def test_the_heart_is_there() -> None:
    assert {str(path.relative_to(ROOT)) for path in PACKAGE} >= HEART


def test_no_catch_all_files() -> None:
    names = {path.stem for path in PACKAGE}
    assert not names & {"utils", "util", "common", "helpers", "misc", "checkpoint"}


def test_source_is_ascii() -> None:
    for path in [*SOURCES, ROOT / "run.sh", ROOT / "setup.cfg"]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert line.isascii(), f"{path}:{number}: {line}"


@pytest.mark.parametrize(
    "arguments",
    [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]],
    ids=lambda arguments: " ".join(arguments),
)
def test_tools_are_content(arguments: list[str]) -> None:
    pytest.importorskip(arguments[0])
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
