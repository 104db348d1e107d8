"""What is written to a terminal, and to a pipe that nobody reads any more."""

from __future__ import annotations

import io
import os

import pytest

from minilora.settings.terminal import Lasting, progress_bar


def test_a_stream_outlives_its_reader() -> None:
    reader, writer = os.pipe()
    stream = Lasting(os.fdopen(writer, "wb"), write_through=True)
    assert stream.write("first") == 5
    stream.flush()
    assert os.read(reader, 9) == b"first"
    os.close(reader)
    assert stream.write("second") == 6
    stream.flush()


def test_a_bar_in_a_file_writes_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr("sys.stderr", file)
    with progress_bar(1000, "row", file=file) as bar:
        for _ in range(1000):
            bar.update()
    shown = [line for line in file.getvalue().split("\r") if line.strip()]
    assert "1000/1000" in shown[-1]
    assert bar.mininterval == 10
