"""The house rules of CONTRIBUTING.md, held by looking at the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = sorted((ROOT / "minilora").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# The floor of each folder, from the ground up; the files beside the folders are the commands.
# A folder imports from its own floor and from those below it.
FLOORS = {
    "settings": 0,
    "model": 0,
    "data": 0,
    "files": 1,
    "tiny": 1,
    "memory": 2,
    "processes": 2,
    "report": 2,
    "training": 3,
}
COMMANDS = 4

# A reader's afternoon: what one optimizer step executes, from its documents to the update, and how
# weights come from their files. Left out is what a first reader can skip: the run around the loop,
# DeepSpeed's workarounds, what happens between steps, the names that settings give to layers,
# answers, offloading, the CUDA kernel.
HEART = """
training/loop training/job training/engine training/learning_rate
model/attention model/dropout model/linear model/llama model/llama_shape model/lora model/loss
model/matrix model/nf4 model/recompute model/rope model/swiglu
model/tiles model/working_copies
data/documents data/schedule data/steps
files/tensor_parts files/weights
""".split()
HEART_LINES = 3200
KNOW_DEEPSPEED = {"minilora.training.engine", "minilora.training.deepspeed_internals"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def floor_of(module: str) -> int:
    """The floor of a module of the package; `minilora` itself lies on the ground."""
    inner = module.split(".")[1:2]
    if not inner or inner[0] == "__version__":
        return 0
    return FLOORS.get(inner[0], COMMANDS)


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


def all_imports() -> Iterator[tuple[str, str, str]]:
    """Every import of the package: who imports, what, and where that stands."""
    for path in PACKAGE:
        for name, line in imports(path):
            yield module_of(path), name, f"{path.relative_to(ROOT)}:{line}: {name}"


def functions() -> Iterator[tuple[Function, str]]:
    """Every function of the package, and where it stands."""
    for path in PACKAGE:
        for node in ast.walk(parse(path)):
            if isinstance(node, Function):
                yield node, f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_imports_go_down_or_sideways() -> None:
    for module, name, where in all_imports():
        if within(name, "minilora"):
            assert floor_of(name) <= floor_of(module), where


def test_no_two_modules_import_each_other() -> None:
    """No circle of any length: every module can be read before those that import it."""
    modules = {module_of(path) for path in PACKAGE}
    below: dict[str, set[str]] = {module: set() for module in modules}
    for module, name, _ in all_imports():
        below[module] |= {name, name.rpartition(".")[0]} & modules
    read: set[str] = set()
    while len(read) < len(modules):
        ready = {module for module in modules - read if below[module] - {module} <= read}
        assert ready, f"these import each other: {sorted(modules - read)}"
        read |= ready


def test_deepspeed_is_imported_in_two_files() -> None:
    found = {module for module, name, _ in all_imports() if within(name, "deepspeed")}
    assert found <= KNOW_DEEPSPEED and found


def test_who_may_import_what() -> None:
    for module, name, where in all_imports():
        assert not within(name, "transformers", "peft", "accelerate", "bitsandbytes"), where
        if within(module, "minilora.data"):
            assert not within(name, "torch.nn"), f"{where}: data knows no layers"
        if within(module, "minilora.memory") and not module.endswith(("in_a_run", "measured")):
            assert not within(name, "torch"), f"{where}: the plan is arithmetic"
        if within(module, "minilora.model"):
            ours = within(name, "torch", "minilora.settings", "minilora.model")
            ours |= module == "minilora.model.nf4_triton" and within(name, "triton")
            assert ours or name.split(".")[0] in sys.stdlib_module_names, f"{where}: torch alone"


def test_no_test_imports_a_test() -> None:
    for path in TESTS:
        for name, line in imports(path):
            last_two = name.split(".")[-2:]
            where = f"{path.relative_to(ROOT)}:{line}: {name}"
            assert not any(part.startswith("test_") for part in last_two), where


def test_nothing_happens_at_import() -> None:
    for path in PACKAGE:
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
                        constant = name.lstrip("_")[0].isupper() or name.startswith("__")
                        assert constant, f"{where}: {name}"
            elif isinstance(node, ast.If):
                test = ast.unparse(node.test)
                assert test in ("__name__ == '__main__'", "TYPE_CHECKING"), f"{where}: if {test}"
            else:
                known = ast.Import | ast.ImportFrom | Function | ast.ClassDef
                assert isinstance(node, known), where


def test_functions_are_short() -> None:
    for node, where in functions():
        assert node.end_lineno is not None
        assert node.end_lineno - node.lineno < 60, where


def test_functions_take_few_parameters() -> None:
    for node, where in functions():
        parts = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = [part.arg for part in parts if part.arg not in ("self", "cls")]
        assert len(names) <= 6, f"{where} has {len(names)} parameters: make a dataclass"


def test_files_are_short() -> None:
    assert not [str(path) for path in [*PACKAGE, *TESTS] if lines_of(path) > 300]


def test_the_heart_can_be_read_in_an_afternoon() -> None:
    heart = sum(lines_of(ROOT / "minilora" / f"{name}.py") for name in HEART)
    assert heart <= HEART_LINES, f"the heart of the package has {heart} lines"


def test_no_catch_all_files() -> None:
    names = {path.stem for path in PACKAGE}
    assert not names & {"utils", "util", "common", "helpers", "misc"}
    unclear = [path for path in PACKAGE if path.stem == "checkpoint" and path.parent.name != "tiny"]
    assert not unclear, "say recompute, weights or snapshot"


def test_source_is_ascii() -> None:
    for path in [*PACKAGE, *TESTS, ROOT / "run.sh", ROOT / "setup.cfg"]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert line.isascii(), f"{path}:{number}: {line}"


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["ruff check", "ruff format --check", "mypy"])
def test_tools_are_content(tool: str) -> None:
    arguments = tool.split()
    pytest.importorskip(arguments[0])
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
