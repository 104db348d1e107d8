"""What a launcher must say, and one line where processes cannot join by it."""

from __future__ import annotations

import socket

import pytest
import torch.distributed as dist

from minilora import train
from minilora.processes.launcher import check_launcher, joining
from minilora.settings.errors import RequestError, RunError

SOUND = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SOUND, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def launched(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"RANK": "1"}, "RANK is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: torchrun and"),
        ({**SOUND, "RANK": "one"}, "RANK=one: a whole number is needed"),
        ({**SOUND, "MASTER_PORT": ""}, "MASTER_PORT=: a whole number is needed"),
        ({**SOUND, "RANK": "1"}, "RANK=1 of WORLD_SIZE=1: ranks count from 0"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x: a whole number is needed"),
    ],
)
def test_a_half_launcher_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    values: dict[str, str],
    words: str,
) -> None:
    launched(monkeypatch, **values)
    with pytest.raises(RequestError) as refused:
        check_launcher()
    assert len(refused.value.problems) == 1 and words in refused.value.problems[0]
    if "MASTER_ADDR" not in values:  # whatever its RANK, nobody else could say it
        arguments = ["--model_name_or_path=x", "--dataset=rows.json", "--output_dir=out"]
        assert train.main(arguments) == 2
        assert words in capsys.readouterr().err


def test_a_whole_launcher_and_none_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    check_launcher()
    launched(monkeypatch, **SOUND)
    check_launcher()


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        launched(monkeypatch, **{**SOUND, "MASTER_PORT": port})
        with pytest.raises(RequestError, match=f"port {port} of 127.0.0.1 is taken") as refused:
            with joining():
                dist.init_process_group("gloo")
    assert "--master_port N" in str(refused.value) and "\n" not in str(refused.value)


def test_any_other_trouble_of_joining_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, **SOUND)
    with pytest.raises(RunError, match="could not join at 127.0.0.1:1: timed out; do MASTER"):
        with joining():
            raise dist.DistNetworkError("timed out\nC++ trace")
