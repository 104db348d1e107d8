"""Whatever is wrong with a request, it is refused before anything is allocated, by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from tests.support.bad_rows import BAD_MESSAGES
from tests.support.broken_weights import BROKEN
from tests.support.wrong import (
    BIG,
    NORM,
    Break,
    Request,
    adapter,
    ask,
    both,
    config,
    drop,
    folder_named,
    header,
    index,
    keys,
    link,
    put,
    rows,
    shard,
    sound,
    template,
)
from tests.support.wrong_data import DATA, DEEPSPEED

INDEX = "model/model.safetensors.index.json"


def norm(value: torch.Tensor) -> Break:
    def change(request: Request) -> None:
        file = request.shard(NORM)
        save_file({**load_file(file), NORM: value}, file)

    return change


def stranger(request: Request) -> None:
    """A tokenizer with more tokens than the embedding has rows."""
    path = request.folder / "model" / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.add_special_tokens([f"<extra {number}>" for number in range(600)])
    backend.save(str(path))
    loop = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    config = {"eos_token": "<extra 599>", "chat_template": loop}
    keys("model/tokenizer_config.json", **config)(request)


def late(request: Request) -> None:
    """The end of an answer is a token of its own from the second answer on; one row has two."""
    answer = "{% if loop.index > 2 %}{{ eos_token }}{% endif %}"
    loop = "{% for m in messages %}{{ m.content }}" + answer + "{% endfor %}"
    keys("model/tokenizer_config.json", chat_template=loop)(request)
    row = {"instruction": "q", "output": "a", "history": [["q", "a"]]}
    put("held.jsonl", json.dumps(row), eval_dataset="@/held.jsonl", eval_strategy="epoch")(request)


A_LOOP = "{% for i in range(99999) %}"
WEIGHTS: dict[str, tuple[Break, list[str]]] = {
    "index: broken JSON": (put(INDEX, "{\n\n,"), ["index.json:3: not JSON"]),
    "index: not UTF-8": (put(INDEX, b"{\n\xff}"), ["index.json:2: not UTF-8; save the file as"]),
    "index: a list": (put(INDEX, []), ["index.json: a JSON object is needed, not list"]),
    "index: empty": (put(INDEX, {"weight_map": {}}), ["weight_map is missing or empty"]),
    "index: above": (index("../model-00003-of-00004.safetensors"), [NORM, "outside the folder"]),
    "index: the folder above": (index(".."), [NORM, "'..', outside the folder"]),
    "index: absolute": (index("/etc/passwd"), ["'/etc/passwd', outside the folder"]),
    "index: another folder": (index("sub/a.safetensors"), ["outside the folder"]),
    "index: no name": (index(""), ["'', outside the folder"]),
    "index: no text": (index(3), ["lies in 3, outside the folder"]),
    "index: a folder": (both(folder_named("model/x"), index("x")), ["model/x: not a plain file"]),
    "index: NUL": (index("a\0b"), ["no such file, though model.safetensors.index.json names it"]),
    "shard: a link to nothing": (link("@/nowhere"), ["no such file", "download it again"]),
    "shard: a link to a device": (link("/dev/zero"), ["safetensors: not a plain file"]),
    "single file and shards": (put("model/model.safetensors", b"x"),
                               ["holds model.safetensors and also the shards of model.safe"]),
    "shard: a link in a circle": (link("@/model/model-00003-of-00004.safetensors"), ["download"]),
    "shard: empty": (shard(lambda _: b""), ["not a whole safetensors file", "download it again"]),
    "shard: four bytes": (shard(lambda _: b"abcd"), ["not a whole safetensors file"]),
    "shard: cut": (shard(lambda raw: raw[:-1]), ["not a whole safetensors file"]),
    "shard: too long": (shard(lambda raw: raw + b"x"), ["not a whole safetensors file"]),
    "shard: greatest header": (shard(lambda raw: b"\xff" * 8 + raw[8:]), ["header too large"]),
    "shard: header of 90 MB": (shard(lambda raw: struct.pack("<Q", 90_000_000) + raw[8:]),
                               ["invalid header length"]),
    "shard: header no JSON": (shard(lambda raw: struct.pack("<Q", 4) + b"abcd"), ["invalid JSON"]),
    "shard: header no UTF-8": (shard(lambda raw: struct.pack("<Q", 2) + b"\xff\xfe"), ["UTF-8"]),
    "header: offsets beyond": (header(data_offsets=[0, 10**12]), [NORM, "invalid offset"]),
    "header: offsets negative": (header(data_offsets=[-4, 124]), ["not a whole safetensors file"]),
    "header: offsets back": (header(data_offsets=[128, 0]), [NORM, "invalid offset"]),
    "header: greatest shape": (header(shape=[2**40, 2**40]), ["overflow"]),
    "header: negative shape": (header(shape=[-32]), ["not a whole safetensors file"]),
    "header: other dtype": (header(dtype="F64"), ["invalid shape, data type, or offset"]),
    "header: unknown dtype": (header(dtype="Q4_K"), ["not a whole safetensors file"]),
    "weight: NaN": (norm(torch.full((32,), torch.nan)), [NORM, "holds NaN or infinite weights"]),
    "weight: infinite": (norm(torch.full((32,), torch.inf)), [NORM, "holds NaN or infinite"]),
    "weight: pickle alone": (both(drop(INDEX), put("model/pytorch_model.bin", b"x")),
                             ["weights are read from safetensors files"]),
    "model: nowhere": (ask(model_name_or_path="@/no"), ["model_name_or_path: @/no: no such f"]),
    "model: of a hub": (ask(model_name_or_path="meta-llama/Llama-3.1-8B"), ["download the model"]),
    "model: endless name": (ask(model_name_or_path="x" * 5000), ["File name too long"]),
}  # fmt: skip
CONFIG: dict[str, tuple[Break, list[str]]] = {
    "another model": (config(model_type="gpt2"), ["config.json: model_type", "it is not known; "]),
    "another activation": (config(hidden_act="gelu"), ["hidden_act is 'gelu': only `silu`"]),
    "layers without end": (config(num_hidden_layers=10**12), ["from 1 to 10000 is needed"]),
    "more layers": (config(num_hidden_layers=3), ["model.layers.2.input_layernorm.weight is miss"]),
    "fewer layers": (config(num_hidden_layers=1), ["is not part of the model of this config"]),
    "greatest vocabulary": (config(vocab_size=10**30), ["vocab_size is 1000", "is needed"]),
    "another width": (config(hidden_size=64), ["has shape [512, 32], config.json implies [512, 64]",
                                              "... and 16 more"]),
    "heads that do not divide": (config(num_key_value_heads=3), ["must divide 4 attention heads"]),
    "odd heads": (config(head_dim=7), ["head_dim is 7: rotary embedding needs an even size"]),
    "text for a number": (config(rope_theta="big"), ["rope_theta is 'big': a positive number"]),
    "zero": (config(rms_norm_eps=0), ["rms_norm_eps is 0: a positive number is needed"]),
    "negative": (config(intermediate_size=-1), ["intermediate_size is -1"]),
    "text for a flag": (config(tie_word_embeddings="yes"), ["is 'yes': true or false is needed"]),
    "other rope": (config(rope_scaling={"rope_type": "longrope"}), ["rope_type is 'longrope'"]),
    "not a number": (put("model/config.json", '{"rms_norm_eps": NaN}'), ["rms_norm_eps is nan"]),
    "endless digits": (put("model/config.json", f'{{"a": {BIG}}}'), ["not JSON that can be read"]),
    "endless depth": (put("model/config.json", "[" * 10**5), ["not JSON that can be read"]),
    "UTF-16": (put("model/config.json", "{}".encode("utf-16")), ["config.json:1: not UTF-8"]),
    "a folder": (both(drop("model/config.json"), folder_named("model/config.json")),
                 ["config.json: not a plain file"]),
}  # fmt: skip
TOKENS: dict[str, tuple[Break, list[str]]] = {
    "no tokenizer": (drop("model/tokenizer.json"), ["needs a fast tokenizer"]),
    "broken tokenizer": (put("model/tokenizer.json", "{"), ["tokenizer.json: not a tokenizer"]),
    "broken config": (put("model/tokenizer_config.json", "{\n,"), ["_config.json:2: not JSON"]),
    "unknown eos": (keys("model/tokenizer_config.json", eos_token="<zzz>"),
                    ["has no special token '<zzz>'", "calls eos_token"]),
    "stop that is no number": (put("model/generation_config.json", {"eos_token_id": "x"}),
                               ["generation_config.json: eos_token_id: not a number"]),
    "another model's": (stranger, ["token 1111, beyond the vocab_size 512", "another model's"]),
    "another model's, in validation": (both(stranger, late), ["token 1111, beyond the vocab_size"]),
    "no template": (template(None), ["has no chat template; say template: llama3"]),
    "template of no kind": (template([{"a": 1}, 3]), ["has no chat template"]),
    "template: unknown": (ask(template="llama4"), ["'llama4' is not one of llama3"]),
    "template: syntax": (template("\n{% if %}"), ["chat template, line 2:"]),
    "template: nested": (template("{% for a in b %}" * 25 + "{% endfor %}" * 25), ["too many"]),
    "template: deep": (template("{{" + "(" * 3000 + "1" + ")" * 3000 + "}}"), ["recursion"]),
    "template: endless": (template(f"{A_LOOP * 3}{'{% endfor %}' * 3}"),
                          ["still busy after 3 s; use template: llama3"]),
    "template: endless text": (template(A_LOOP + "{{ messages }}{% endfor %}"), ["writes more"]),
    "template: great range": (template("{% for i in range(999999999) %}{% endfor %}"),
                              ["refuses it: Range too big"]),
    "template: power": (template("{{ 9 ** 9 ** 9 }}"), ["** of such values is not allowed"]),
    "template: repetition": (template("{{ 'x' * 9999999999 }}"), ["* of such values"]),
    "template: great number": (template(f"{{% set ns = namespace(x=9) %}}{A_LOOP}"
                                        "{% set ns.x = ns.x * ns.x %}{% endfor %}"), ["* of such"]),
    "template: itself": (template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), ["recursio"]),
    "template: division": (template("{{ 1 / (messages | length - 2) }}"), ["division by zero"]),
    "template: files": (template("{% include '/etc/passwd' %}"), ["no loader"]),
    "template: Python": (template("{{ ''.__class__.__mro__ }}"), ["refuses it", "unsafe"]),
    "template: changes": (template("{{ messages.append(1) }}"), ["refuses it", "unsafe"]),
}  # fmt: skip
ADAPTER: dict[str, tuple[Break, list[str]]] = {
    "nowhere": (ask(adapter_name_or_path="@/no"), ["adapter_name_or_path: @/no: no such folder"]),
    "a whole model": (ask(adapter_name_or_path="@/model"), ["adapter_config.json: no such file"]),
    "no weights": (both(drop("adapter/adapter_model.safetensors"), adapter()),
                   ["adapter_model.safetensors: no such file; no other format is read"]),
    "garbage": (both(put("adapter/adapter_model.safetensors", b"x" * 99), adapter()),
                ["adapter_model.safetensors: not a whole safetensors file"]),
    "broken config": (both(adapter(), put("adapter/adapter_config.json", "{")), ["json:1: not"]),
    "another rank": (adapter(r=8), ["has shape [4, 32], the model needs [8, 32]", "and 3"]),
    "no rank": (adapter(r=True), ["r is True; a whole number"]),
    "endless strength": (adapter(lora_alpha=1e999), ["lora_alpha is inf; a positive number"]),
    "another kind": (adapter(peft_type="IA3"), ["peft_type is 'IA3', not LORA"]),
    "DoRA": (adapter(use_dora=True), ["lora_magnitude_vector is missing"]),
    "quantized": (adapter(use_qalora=True), ["use_qalora = True is not read here"]),
    "PiSSA": (adapter(init_lora_weights="pissa"), ["convert the adapter to plain LoRA"]),
    "more layers": (adapter(target_modules=["q_proj", "v_proj", "k_proj"]), ["k_proj.lora_A"]),
    "a pattern": (adapter(target_modules="no_such"), ["'no_such' matches the whole path of"]),
    "contradicts DoRA": (both(adapter(), ask(use_dora=True)), ["True contradicts the False of"]),
    "idle pattern": (ask(rank_pattern='{"k_proj": 4}', lora_target="q_proj"),
                     ["rank_pattern: 'k_proj' matches the end of no path of lora_target"]),
    "no expression": (ask(lora_target="*_proj"), ["lora_target: '*_proj' is no regular"]),
    "everything": (ask(lora_target=".*"), ["matches embed_tokens, lm_head; those get no LoRA"]),
    "norms": (ask(additional_target="norm"), ["additional_target: norm cannot be trained whole"]),
    "two adapters": (ask(adapter_name_or_path="@/a,@/b"), ["adapter_name_or_path: @/a,@/b: no"]),
    "contradicts the rank": (both(adapter(), ask(lora_rank=16)),
                             ["lora_rank (command line): 16 contradicts the 4", "remove the key"]),
    "contradicts the layers": (both(adapter(), ask(lora_target="q_proj")),
                               ["means other layers than those"]),
    "unknown layers": (ask(lora_target="q_proj,wq"), ["no layer is called wq; known: q_proj"]),
}  # fmt: skip
GROUPS = {"weights": WEIGHTS, "config.json": CONFIG, "tokens": TOKENS, "adapter": ADAPTER,
          "deepspeed": DEEPSPEED, "data": DATA}  # fmt: skip
CASES = {
    f"{group}: {name}": case for group, cases in GROUPS.items() for name, case in cases.items()
}


@pytest.fixture
def request_(tiny: Path, tmp_path: Path) -> Request:
    return sound(tmp_path, tiny)


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_request_is_refused_by_name(name: str, request_: Request) -> None:
    change, words = CASES[name]
    change(request_)
    problems = request_.problems()
    text = "\n".join(problems)
    assert text and all(word in text for word in words), text
    assert len(problems) < 9, "more than anybody reads"


def test_a_sound_request_is_not_refused(request_: Request) -> None:
    assert request_.problems() == []
    assert not (request_.folder / "out").exists(), "checking writes nothing"


def test_links_of_the_hubs_cache_are_followed(request_: Request) -> None:
    """There snapshots/REVISION/NAME is a link to ../../blobs/HASH."""
    revision, blobs = request_.folder / "snapshots" / "abc", request_.folder / "blobs"
    revision.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate((request_.folder / "model").iterdir()):
        path.rename(blobs / str(number))
        (revision / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    ask(model_name_or_path="@/snapshots/abc")(request_)
    assert request_.problems() == []


@pytest.mark.parametrize("case", BROKEN)
def test_the_cases_of_the_weights(case: str, request_: Request) -> None:
    change, words = BROKEN[case]
    change(request_.folder / "model")
    text = "\n".join(request_.problems())
    assert all(word in text for word in words)


@pytest.mark.parametrize(("row", "reason"), BAD_MESSAGES)
def test_the_cases_of_the_rows(row: Any, reason: str, request_: Request) -> None:
    good = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    rows(good, *[row] * 6)(request_)
    (problem,) = request_.problems()
    assert "too many unusable rows" in problem and f"6: {reason} (@/rows.jsonl:2, " in problem


def test_all_is_said_at_once(request_: Request) -> None:
    for name in ("weights: index: above", "deepspeed: another batch", "data: broken line",
                 "data: output of another run", "tokens: unknown eos"):  # fmt: skip
        CASES[name][0](request_)
    text = "\n".join(request_.problems())
    for words in ("outside the folder", "train_batch_size is 3", "rows.jsonl:2", "holds a run",
                  "calls eos_token"):  # fmt: skip
        assert words in text


def test_the_template_is_among_what_is_said_at_once(request_: Request) -> None:
    """An unknown name is told with the other settings, a broken one with those and with files."""
    ask(template="llama4", lora_rank=0)(request_)
    assert len(request_.problems()) == 2
    TOKENS["template: syntax"][0](request_)
    ask(template="null")(request_)
    rank, template = request_.problems()
    assert "lora_rank" in rank and "chat template, line 2" in template
    ask(template="llama3")(request_)
    assert len(request_.problems()) == 1
    ask(template="null", lora_rank=4)(request_)
    for name in ("template: syntax", "deepspeed: another batch", "data: broken line"):
        CASES[name if name in CASES else f"tokens: {name}"][0](request_)
    text = "\n".join(request_.problems())
    for words in ("chat template, line 2", "train_batch_size is 3", "rows.jsonl:2"):
        assert words in text


@pytest.mark.parametrize("name", ["config.json: endless depth", "tokens: template: endless text"])
def test_real_processes_refuse_with_2(
    name: str, request_: Request, launch: Callable[..., tuple[int, str]]
) -> None:
    change, words = CASES[name]
    change(request_)
    code, output = launch(1, ["-m", "minilora.train", *request_.words], with_="alone")
    assert code == 2 and "Traceback" not in output, output
    assert all(word in output for word in words)
    assert [line for line in output.splitlines() if line.startswith("error: ")]


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 80 and json.dumps(list(CASES)).isascii()
