"""Shared by all tests: the environment, tiny checkpoints, a seed, and real processes."""

import os

# Before torch is imported anywhere: one thread per process, the CPU as torch's and DeepSpeed's
# device on a machine with GPUs too, and no AMX, which some virtual machines announce and then kill
# the process for.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # 0 for the one test that needs a GPU
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gc
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

from minilora.tiny.checkpoint import TinyShape, write_tiny
from tests.support.collected import COLLECTED
from tests.support.forked import Places, run_forked
from tests.support.processes import (
    HANGING_SECONDS,
    PACKABLE,
    SMALL,
    Launch,
    command_line,
    run_command,
)
from tests.support.runs import Ground, make_ground

# Folders of which every test is slow.
SLOW = ("tests/promises/", "tests/commands/")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves the slow folders alone where slow tests are not wanted: importing them takes long."""
    if config.option.markexpr != "not slow":
        return None
    inside = collection_path.relative_to(config.rootpath).as_posix()
    return f"{inside}/".startswith(SLOW) or None


def pytest_collection_finish() -> None:
    """Keeps what was imported out of the garbage that tests collect."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks as slow whole promises, whole commands, and what starts processes through `launch`."""
    config.stash[COLLECTED] = [item.nodeid for item in items]
    for item in items:
        whole = item.nodeid.startswith(SLOW)
        if whole or "launch" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds torch before every test; the value is there for those who seed more."""
    torch.manual_seed(1234)
    return 1234


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 2 layers, hidden 32, 4 heads, 2 kv heads, fp32, in several shards."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, SMALL)
    return folder


@pytest.fixture(scope="session")
def tiny_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the head tied to the embeddings, as in Llama 3.2."""
    folder = tmp_path_factory.mktemp("tiny_tied")
    write_tiny(folder, TinyShape(**{**vars(SMALL), "tied": True}))
    return folder


@pytest.fixture(scope="session")
def packable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights can be packed to 4 bits: hidden 64 and MLP 128, fp32."""
    folder = tmp_path_factory.mktemp("packable")
    write_tiny(folder, PACKABLE)
    return folder


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Run real processes: launch(world_size, arguments, with_=..., timeout=..., env=...)."""
    outputs = tmp_path_factory.mktemp("outputs")

    def run(
        world_size: int,
        arguments: Sequence[str | Path],
        *,
        with_: str,
        machines: int = 1,
        timeout: float = HANGING_SECONDS,
        env: dict[str, str] | None = None,
    ) -> tuple[int, str]:
        """Start `arguments` (a script and its arguments, or -m and a module) on world_size ranks.

        with_: torchrun, deepspeed (its launcher), minilora (`minilora train`, so DeepSpeed's too),
        python (one process without a launcher); or what shares the imports of torch and DeepSpeed:
        forked (ranks, of `machines` machines with world_size each) and alone (one process without
        a launcher). Returns the exit code and stdout with stderr. What is still running after
        `timeout` seconds hangs, and fails the test; no run that is all right comes near them.
        """
        words = [str(part) for part in arguments]
        environment = {**os.environ, **(env or {})}
        output = Path(mkdtemp(dir=outputs)) / "output"  # tests launch from several threads too
        if with_ in ("forked", "alone"):
            places = None if with_ == "alone" else Places(world_size, machines)
            code = run_forked(words, places, environment, output, timeout)
        else:
            command = command_line(with_, world_size, words)
            code = run_command(command, environment, output, timeout)
        text = output.read_text(encoding="utf-8")
        if code is None:
            pytest.fail(f"still running after {timeout} s: {' '.join(words)}\n{text}")
        return code, text

    return run


@pytest.fixture(scope="session")
def tmpfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path | None]]:
    """Mounts small file systems in memory; gives None where that is not allowed."""
    mounted: list[Path] = []

    def mount(size: str) -> Path | None:
        folder = tmp_path_factory.mktemp("tmpfs")
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(words, capture_output=True).returncode:
            return None
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def family_checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, Path]:
    """A tiny checkpoint of each other family by its model_type, as transformers writes it."""
    from tests.support.families import TINY, write_family  # imports transformers: seconds

    folder = tmp_path_factory.mktemp("families")
    return {name: write_family(folder / name, name, tiny) for name in TINY}


@pytest.fixture(scope="session")
def ground(
    tmp_path_factory: pytest.TempPathFactory,
    tiny: Path,
    tiny_tied: Path,
    packable: Path,
    family_checkpoints: dict[str, Path],
) -> Ground:
    """Rows, checkpoints and start adapters of the tests of whole runs."""
    models = {"tiny": tiny, "tiny_tied": tiny_tied, "packable": packable, **family_checkpoints}
    return make_ground(tmp_path_factory.mktemp("runs"), models)
