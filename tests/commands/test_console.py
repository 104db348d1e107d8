"""The command `minilora`: what it lists, what each word runs, and how training is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from minilora.__main__ import COMMANDS, main
from minilora.launch import VISIBLE, launcher
from minilora.settings.errors import RequestError
from tests.support.processes import Launch

# Imports what the command imports, and says which of these are loaded then.
LOADED = """
import sys
from minilora.__main__ import main
sys.argv = ["minilora"]
assert main() == 0
print({"torch", "numpy", "yaml", "argparse", "deepspeed"} & sys.modules.keys())
"""


def test_alone_it_lists_its_commands_and_imports_nothing_that_takes_time() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *listed, loaded = done.stdout.splitlines()
    assert [line.split()[0] for line in listed[1:-1]] == list(COMMANDS)
    assert loaded == "set()"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, "usage: minilora COMMAND"),
        (["--version"], 0, "minilora 0."),
        (["fly"], 2, "error: 'fly' is no command\nusage: minilora COMMAND"),
        (["--model_name_or_path", "x"], 2, "'--model_name_or_path' is no command"),
    ],
)
def test_words_that_run_nothing(
    words: list[str],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["minilora", *words])
    assert main() == code
    printed = capsys.readouterr()
    assert said in (printed.err if code else printed.out)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["plan"], 2, "model_name_or_path is missing"),
        (["plot", "nowhere"], 2, "nowhere: no such file"),
        (["tiny", "--help"], 0, "usage: python -m minilora.tiny"),
        (["train", "--help"], 0, "--num_gpus N"),
        (["train", "--lora_ranks", "3"], 2, "did you mean lora_rank?"),
    ],
)
def test_a_word_runs_its_module(words: list[str], code: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "minilora", *words], capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr


def test_without_a_gpu_it_starts_one_process_or_as_many_as_are_asked_for() -> None:
    for asked, count in ((None, "1"), (2, "2")):
        command, changes = launcher(["run.yaml", "--seed", "1"], asked, 0, {})
        assert command[:4] == [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
        assert command[4] == "--master_port" and 1024 <= int(command[5]) < 65536
        assert command[6:] == ["--num_gpus", count, "--module", "minilora.train", "run.yaml",
                               "--seed", "1"]  # fmt: skip
        assert changes == {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        }


def test_what_the_user_has_set_stays() -> None:
    _, changes = launcher([], None, 0, {"OMP_NUM_THREADS": "8", "DS_ACCELERATOR": "xpu"})
    assert changes["OMP_NUM_THREADS"] == "8" and changes["DS_ACCELERATOR"] == "xpu"


@pytest.mark.parametrize(
    ("asked", "visible", "narrowed"),
    [
        (None, None, None),
        (7, None, None),
        (3, None, "0,1,2"),
        (None, "1,2,3,4,5,6,7", None),
        (2, "7,6,5,4,3,2,1", "7,6"),
    ],
)
def test_on_gpus_the_launcher_takes_those_that_are_visible(
    asked: int | None, visible: str | None, narrowed: str | None
) -> None:
    """Seven of them. Without options of its own the launcher goes by CUDA_VISIBLE_DEVICES."""
    environment = {} if visible is None else {VISIBLE: visible}
    command, changes = launcher(["run.yaml"], asked, 7, environment)
    assert command[6:] == ["--module", "minilora.train", "run.yaml"]
    assert changes == ({} if narrowed is None else {VISIBLE: narrowed})


@pytest.mark.parametrize(
    ("asked", "gpus", "visible", "problem"),
    [
        (8, 7, "", "--num_gpus: 8; this machine shows 7"),
        (-1, 0, "", "--num_gpus must be above 0"),
        (None, 2, "GPU-8932f937,GPU-11111111", "launcher takes numbers alone"),
    ],
)
def test_numbers_that_cannot_be_started(asked: int, gpus: int, visible: str, problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        launcher([], asked, gpus, {VISIBLE: visible})


def test_the_exit_code_of_the_run_is_that_of_the_command(tmp_path: Path, launch: Launch) -> None:
    """Two ranks refuse it: the settings are sound, and there is no such model."""
    (tmp_path / "run.yaml").write_text(
        "model_name_or_path: nowhere\ndataset: rows.json\noutput_dir: out\n", encoding="utf-8"
    )
    words = ["-m", "minilora.train", str(tmp_path / "run.yaml")]
    code, output = launch(2, words, with_="minilora")
    assert code == 2, output
    assert output.count("error: model_name_or_path: nowhere: no such folder") == 1
    assert "Traceback" not in output
