"""The package as pip installs it: everything that runs need lies in the wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("zero0", "zero2", "zero3", "zero3_nodes", "zero3_offload")
SHIPPED = {"README.md", *(f"{name}.json" for name in NAMES)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds, from a copy: a build folder of earlier days would leak into it.

    It needs no network, for setuptools is installed already.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("minilora", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_deepspeed_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
    inside = {Path(name).name for name in names if name.startswith("minilora/ds_configs/")}
    assert inside == SHIPPED


@pytest.mark.slow
def test_the_wheel_has_the_command_and_says_that_it_is_typed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        (entries,) = [name for name in names if name.endswith("entry_points.txt")]
        written = opened.read(entries).decode()
    assert "minilora/py.typed" in names
    assert written.split() == "[console_scripts] minilora = minilora.__main__:main".split()


@pytest.mark.slow
def test_an_installed_package_finds_its_files_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(installed)
    code = (
        "from minilora.files.deepspeed_file import find_ds_config; import minilora; "
        "print(minilora.__file__, find_ds_config('zero3').read_text())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{installed}/minilora/__init__.py")
    assert '"stage": 3' in done.stdout
