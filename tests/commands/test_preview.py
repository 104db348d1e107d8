"""The preview held against what transformers renders, what is trained on, and sums done anew."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from minilora.preview import main
from minilora.settings.command_line import read_settings
from tests.support.prepared import prepared_of
from tests.support.runs import run_jobs, write_rows

ROWS = 40


@pytest.fixture(scope="module")
def given(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("preview")
    write_rows(folder / "rows.jsonl", ROWS)
    return {"model_name_or_path": tiny, "dataset": folder / "rows.jsonl", "disable_shuffling": True}


def preview(capsys: pytest.CaptureFixture[str], given: dict[str, Any], **more: Any) -> str:
    assert main([f"--{key}={value}" for key, value in {**given, **more}.items()]) == 0
    return capsys.readouterr().out


def lengths_of(given: dict[str, Any], **more: Any) -> list[int]:
    words = [f"--{key}={value}" for key, value in {**given, **more}.items()]
    settings = read_settings(words, "preview")
    return [int(length) for length in prepared_of(settings).documents.lengths]


def test_samples_are_what_transformers_renders_with_the_answers_marked(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(given["model_name_or_path"])
    rows = [json.loads(line) for line in given["dataset"].read_text().splitlines()]
    output = preview(capsys, given, samples=ROWS).split("\n\n40 rows used")[0]
    header = r"--- document (\d+) of 40: (\d+) tokens, (\d+) of them trained \(\[\[ \]\]\) ---\n"
    parts = re.split(header, output)[1:]
    assert parts[0::4] == [str(number) for number in range(1, ROWS + 1)]
    for row, tokens, labelled, text in zip(
        rows, parts[1::4], parts[2::4], parts[3::4], strict=True
    ):
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert re.sub(r"\[\[|\]\]", "", text).rstrip("\n") == whole.rstrip("\n")
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
        plain = not any("<|" in turn["content"] for turn in row["messages"])
        assert int(tokens) == len(ids) or not plain  # which tokenizers parse, and we do not
        answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        marked = re.findall(r"\[\[(.*?)\]\]", text, re.DOTALL)
        assert marked == [f"{answer}<|eot_id|>" for answer in answers]
        inner = (tokenizer(answer, add_special_tokens=False).input_ids for answer in answers)
        assert int(labelled) == sum(len(ids) + 1 for ids in inner)


def test_samples_come_from_all_over_the_data(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for count, shown in ((0, []), (1, [1]), (2, [1, 40]), (3, [1, 20, 40])):
        output = preview(capsys, given, samples=count)
        assert [int(found) for found in re.findall(r"--- document (\d+) of", output)] == shown


def test_what_is_cut_and_dropped_is_counted(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = lengths_of(given), lengths_of(given, cutoff_len=90)
    assert len(whole) == len(cut) and max(cut) == 90
    lost = [before - after for before, after in zip(whole, cut, strict=True) if before > after]
    output = preview(capsys, given, cutoff_len=90)
    assert f"40 rows used, 0 dropped; {len(lost)} cut, by {sum(lost):,} tokens in all;" in output
    assert " cut, by " not in preview(capsys, given)
    held = given["dataset"].with_name("held.jsonl")
    held.write_text(given["dataset"].read_text() + '\n{"messages": []}\n', encoding="utf-8")
    output = preview(capsys, given, eval_dataset=held, eval_strategy="epoch")
    assert "40 documents to validate with (40 rows used, 1 dropped; 1: " in output


def test_what_becomes_of_special_text_and_of_weights_is_shown(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = given["dataset"].with_name("special.jsonl")
    say = [{"role": role, "content": "a <|eot_id|> b"} for role in ("user", "assistant")]
    masked = [*say, say[0], {**say[1], "weight": 0, "content": "never"}]
    row = json.dumps({"messages": masked})
    rows.write_text(f"{row}\n" * 2, encoding="utf-8")
    output = preview(capsys, given, dataset=rows, samples=1)
    note = "2 rows hold the text of special tokens (<|eot_id|>), which are"
    assert f"\n{note} plain characters; with split_special_tokens: false they are" in output
    assert "[[a <|eot_id|> b<|eot_id|>]]" in output and "\n\nnever<|eot_id|>" in output
    whole = re.search(r"(\d+) of them trained", output)
    output = preview(capsys, given, dataset=rows, samples=1, split_special_tokens=False)
    assert f"\n{note} special tokens (split_special_tokens: false)" in output
    fewer = re.search(r"(\d+) of them trained", output)
    assert whole and fewer and int(fewer[1]) < int(whole[1])


def test_the_histogram_counts_every_document_where_it_belongs(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for cutoff in (50, 120, 2048):
        lengths = lengths_of(given, cutoff_len=cutoff)
        output = preview(capsys, given, cutoff_len=cutoff)
        lines = re.findall(r"^ +([\d,]+) +([\d,]+) +(\d+) +(\d+)%  (#*)$", output, re.MULTILINE)
        so_far, most = 0, max(int(line[2]) for line in lines)
        for low, high, count, share, bar in lines:
            first, last = int(low.replace(",", "")), int(high.replace(",", ""))
            inside = sum(first <= length <= last for length in lengths)
            so_far += inside
            assert int(count) == inside
            assert int(share) == round(100 * so_far / len(lengths))
            assert len(bar) == pytest.approx(40 * inside / most, abs=1)
        assert so_far == len(lengths) and len(lines) <= 12
        assert f"longest {max(lengths)}" in output


def test_steps_and_padding_are_what_they_would_be(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows in the order of the file, batches of 3: what is added is what torch pads."""
    lengths = lengths_of(given)
    more = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_gpus": 2}
    output = preview(capsys, given, **more, cutoff_len=600)
    padded = 0
    for start in range(0, len(lengths), 3):
        documents = [torch.zeros(length) for length in lengths[start : start + 3]]
        padded += torch.nn.utils.rnn.pad_sequence(documents).numel()
    extra, total = padded - sum(lengths), sum(lengths)
    assert f"would cost {extra:,} tokens more, {extra / total:.0%}" in output and extra > 0
    steps, rest = divmod(len(lengths), 12)
    steps += rest > 0
    room, packed, used = 12 * 600, 1, 0
    for length in lengths:
        packed, used = (packed, used + length) if used + length <= room else (packed + 1, length)
    lines = [line.split() for line in output.splitlines() if " packing: " in line]
    assert [line[:5] for line in (lines[0], ["*", *lines[1]])] == [
        ["*", "packing:", "false", str(steps), str(3 * steps)],
        ["*", "packing:", "true", str(packed), str(3 * packed)],
    ]
    assert f"{total / packed / room:.0%} of 12 x 600" in output
    assert "* packing: true " in preview(capsys, given, packing=True)


@pytest.mark.parametrize("tile", [100, 4096])
def test_tiles_are_as_full_as_it_says(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str], tile: int
) -> None:
    """On one GPU, one document per step: each is a tile."""
    lengths = lengths_of(given)
    output = preview(capsys, given, tile_tokens=tile, per_device_train_batch_size=1)
    full = sum(lengths) / sum(max(length, tile) for length in lengths)
    assert f"a tile has {sum(lengths) / ROWS:,.0f} tokens on average: {full:.0%} of" in output


def test_tiles_are_those_of_a_rank_with_even_work(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Six documents on two ranks: beside the long one attention leaves no room for a short one."""
    rows = tmp_path / "rows.txt"
    rows.write_text("\n".join("word " * count for count in (90, *[25] * 5)), encoding="utf-8")
    asked = {**given, "dataset": rows, "stage": "pt", "num_train_epochs": 1}
    asked |= {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 3}
    long, *short = lengths_of(asked)
    assert long < sum(short[1:]), "by tokens alone the last one would go with the long one"
    output = preview(capsys, asked, samples=0, num_gpus=2, tile_tokens=4096)
    assert f"a tile has {long:,} tokens on average" in output


def test_the_steps_are_those_of_the_training(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str], launch: Any, tmp_path: Path
) -> None:
    job = {**{key: str(value) for key, value in given.items()}, "packing": True, "cutoff_len": 100}
    job |= {"per_device_train_batch_size": 4, "num_train_epochs": 2}
    output = preview(capsys, job)
    (steps,) = re.findall(r"^\* packing: true +\d+ +(\d+)", output, re.MULTILINE)
    job |= {"output_dir": str(tmp_path / "out"), "deepspeed": "zero0", "plot_loss": False}
    run_jobs(launch, 1, [job])
    last = (tmp_path / "out" / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    assert json.loads(last)["current_steps"] == int(steps)


def test_colour_for_terminals_and_no_traceback_for_head(given: dict[str, Any]) -> None:
    words = [f"--{key}={value}" for key, value in given.items()]
    command = [sys.executable, "-m", "minilora.preview", *words, "--samples", "40"]
    terminal = [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])", *command]
    shown = subprocess.run(terminal, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert "\x1b[32m" in shown.stdout and "[[" not in shown.stdout
    line = f"{shlex.join(command)} | head -1"
    shown = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert shown.stdout.startswith("--- document 1 of 40") and shown.stderr == ""


def test_the_lengths_are_drawn(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    preview(capsys, given, plot=tmp_path / "lengths.svg", cutoff_len=100)
    text = (tmp_path / "lengths.svg").read_text(encoding="utf-8")
    for name in ("tokens per document", "documents", "cutoff_len 100"):
        assert f"<!-- {name} -->" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples=-1"], "--samples must be at least 0"),
        (["--num_gpus=0"], "--num_gpus must be at least 1"),
        (["--dataset=@/none.json"], "none.json"),
        (["--lora_ranks=3"], "did you mean lora_rank?"),
        (["--plot=@/x.foo"], "--plot: "),
        (["--dataset="], "dataset"),
    ],
)
def test_wrong_requests_are_refused(
    given: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    words = [f"--{key}={value}" for key, value in given.items()]
    assert main([*words, *(word.replace("@", str(tmp_path)) for word in more)]) == 2
    assert message in capsys.readouterr().err


def test_documents_beyond_what_the_model_was_made_for_are_told(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(given["model_name_or_path"], tmp_path / "model")
    longest, file = max(lengths_of(given)), tmp_path / "model" / "config.json"
    for positions in (longest, longest - 1):
        config = json.loads(file.read_text()) | {"max_position_embeddings": positions}
        file.write_text(json.dumps(config))
        output = preview(capsys, given, model_name_or_path=tmp_path / "model")
        told = f"the longest document has {longest:,} tokens, and the base model was made for"
        assert (f"{told} {positions:,} (max_position_embeddings)" in output) == (
            positions < longest
        )
