"""Whatever lies in a file: it is read, or refused with RequestError, never anything else.

MINILORA_EXAMPLES says how many files each test makes.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minilora.data.chat import make_template
from minilora.data.conversations import Conversation
from minilora.data.datasets import Tally, read_conversations
from minilora.data.tokenizer import load_tokenizer
from minilora.files.adapter import WEIGHTS, read_adapter
from minilora.files.adapter_config import CONFIG, read_adapter_shape
from minilora.files.deepspeed_file import Facts, resolve_ds_config
from minilora.files.model_config import read_model_config
from minilora.files.records import STATE
from minilora.files.snapshot import TENSORS, State, read_state, read_tensors
from minilora.files.weights import INDEX, SINGLE, Checkpoint, read_checkpoint
from minilora.settings.settings import DataSettings, TrainSettings
from minilora.training.same_run import differences
from tests.support.any_value import found_or_refused, values
from tests.support.article import example_shape

Rows = tuple[list[Conversation], Tally]
any_file = settings(
    deadline=None,  # a busy machine is no failure
    max_examples=int(os.environ.get("MINILORA_EXAMPLES", "60")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
ROLES = ["user", "assistant", "system", "tool", "function_call", "human", "gpt", "x"]
COLUMNS = ["messages", "conversations", "instruction", "input", "output", "history", "system"]
message = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("role", "from"), st.one_of(st.sampled_from(ROLES), values)),
        **dict.fromkeys(("content", "value", "tool_calls"), values),
    },
)
row = st.one_of(
    values,
    st.dictionaries(
        st.sampled_from(COLUMNS), st.one_of(st.lists(message, max_size=4), values), max_size=4
    ),
)


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in one file, whose files are replaced by any others and put back."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("any") / "model"))
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / INDEX).unlink()
    save_file(tensors, folder / SINGLE)
    return folder


def read_for_both_stages(path: Path, content: bytes) -> list[Rows | None]:
    path.write_bytes(content)
    return [
        found_or_refused(lambda stage=stage: read_conversations([str(path)], DataSettings(), stage))
        for stage in ("sft", "pt")
    ]


def is_whole(found: Rows | None) -> bool:
    """Refused, or as many conversations as are counted, all of them text."""
    if found is None:
        return True
    rows, tally = found
    turns = [turn for row in rows for turn in row.turns]
    return len(rows) == tally.kept > 0 and all(isinstance(turn.text, str) for turn in turns)


@any_file
@given(st.lists(row, max_size=8), st.sampled_from([".json", ".jsonl", ".txt"]))
def test_any_rows(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"rows{suffix}"
    text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    assert all(map(is_whole, read_for_both_stages(path, text.encode())))


@any_file
@given(
    st.one_of(st.binary(max_size=80), st.text(alphabet='[]{}",:\\u0 19.e-\n', max_size=60)),
    st.sampled_from([".json", ".jsonl", ".txt"]),
)
def test_any_bytes_as_rows(
    tmp_path_factory: pytest.TempPathFactory, content: bytes | str, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
    raw = content if isinstance(content, bytes) else content.encode()
    assert all(map(is_whole, read_for_both_stages(path, raw)))


@any_file
@given(st.dictionaries(st.sampled_from(["file_name", "formatting", "columns", "tags", "split"]),
                       st.one_of(st.just("rows.json"), values)), values)  # fmt: skip
def test_any_dataset_info(
    tmp_path_factory: pytest.TempPathFactory, entry: dict[str, Any], other: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "rows.json").write_text('[{"instruction": "q", "output": "a"}]')
    for content in ({"mine": entry}, {"mine": other}, other):
        (folder / "dataset_info.json").write_text(json.dumps(content))
        data = DataSettings(dataset_dir=str(folder))
        found = found_or_refused(lambda data=data: read_conversations(["mine"], data, "sft"))
        assert found is None or found[1].kept == 1


def read_as_weights(
    model: Path, content: bytes
) -> tuple[Checkpoint | None, list[dict[str, Tensor] | None]]:
    """The same bytes as weights; and as an adapter's and a snapshot's tensors, x of one number."""
    path = model / SINGLE
    whole = path.read_bytes()
    try:
        for name in (SINGLE, WEIGHTS, TENSORS):
            (model / name).write_bytes(content)
        checkpoint = found_or_refused(lambda: read_checkpoint(read_model_config(model)))
        adapter = found_or_refused(lambda: read_adapter(model, {"x": (1,)}))
        return checkpoint, [adapter, found_or_refused(lambda: read_tensors(model, {"x": (1,)}))]
    finally:
        path.write_bytes(whole)


@any_file
@given(st.data())
def test_any_damage_to_a_shard(model: Path, data: st.DataObject) -> None:
    raw = bytearray((model / SINGLE).read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.one_of(st.integers(0, 8), st.integers(0, header)))
        raw[where] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] or raw
    checkpoint, others = read_as_weights(model, bytes(raw))
    assert checkpoint is None or checkpoint.total_bytes < len(raw), "all of it is in the file"
    assert others == [None, None], "a model is no adapter and no snapshot"


entry = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "I8", "F4", "C64"]), values),
        "shape": st.one_of(st.lists(st.integers(-1, 2**65), max_size=3), values),
        "data_offsets": st.one_of(st.lists(st.integers(-1, 2**65), max_size=3), values),
    },
)


@any_file
@given(
    st.one_of(
        st.dictionaries(
            st.sampled_from(["__metadata__", "model.norm.weight", "x", ""]),
            st.one_of(entry, values),
        ),
        values,
    ),
    st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    st.binary(max_size=40),
)
def test_any_header(model: Path, header: Any, size: int | None, rest: bytes) -> None:
    text = json.dumps(header).encode()
    start = struct.pack("<Q", len(text) if size is None else size)
    checkpoint, others = read_as_weights(model, start + text + rest)
    assert checkpoint is None, "a few bytes are no model"
    assert all(found is None or found["x"].shape == (1,) for found in others)


FILES = [
    "config.json", INDEX, CONFIG, STATE, "ds.json", "tokenizer_config.json", "tokenizer.json",
    "special_tokens_map.json", "generation_config.json",
]  # fmt: skip
# What lies in those that the tiny checkpoint has not.
MADE = {
    INDEX: {"weight_map": {"x": SINGLE}},
    CONFIG: {"r": 4, "lora_alpha": 8, "peft_type": "LORA", "target_modules": ["q_proj"]},
    STATE: {
        "step": 1,
        "rows": 1,
        "log_totals": {},
        "must_match": {"lora": {}},
        "about": {"written": 1.0},
        "best": {},
    },
    "ds.json": {
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": "auto"},
        "fp16": {},
        "optimizer": {"params": {}},
    },
}


@any_file
@given(st.data(), st.sampled_from(FILES))
def test_any_json(model: Path, data: st.DataObject, name: str) -> None:
    """Files of a checkpoint, an adapter, a snapshot and DeepSpeed with some values replaced."""
    path = model / name
    whole = path.read_bytes() if path.exists() else None
    known = json.loads(whole) if whole else MADE[name]
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(known) + ["x"]), values, max_size=3))
    path.write_text(json.dumps({**known, **changes}))
    try:
        facts = Facts(2, example_shape("llama-3.1-8b"), False)
        checkpoint = found_or_refused(lambda: read_checkpoint(read_model_config(model)))
        template = found_or_refused(lambda: make_template(None, load_tokenizer(model)))
        lora = found_or_refused(
            lambda: read_adapter_shape(model, read_model_config(model).shape, 0.0)
        )
        state = found_or_refused(lambda: read_state(model))
        engine = found_or_refused(
            lambda: resolve_ds_config(model / "ds.json", TrainSettings(), facts)
        )
        assert checkpoint is None or {*checkpoint.tensors} == {*checkpoint.shape.parameter_shapes()}
        assert template is None or template.stop_ids
        assert lora is None or lora.rank > 0
        assert engine is None or "optimizer" not in engine
        if state is not None:
            now = State(0, 0, {}, {"seed": 5}, {})
            differ = state.must_match.get("seed") != 5
            assert bool(differences(state, now, model)) == differ
            assert type(state.step) is int
        if name == STATE:
            assert (state is not None) or changes, "as it is made it can be read"
    finally:
        path.unlink()
        if whole is not None:
            path.write_bytes(whole)
