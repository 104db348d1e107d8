"""Answers held against transformers and PEFT, and what is printed of them."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from minilora.data.tokenizer import load_tokenizer
from minilora.files.model_config import read_model_config
from minilora.files.weights import INDEX
from minilora.generate import BATCH, main, show, stream
from tests.support.merging import make

Case = tuple[Path, Path]
Oracle = Callable[[list[dict[str, str]]], str]

CHINESE = "\u4f60\u597d\uff0c\u4e16\u754c"
NEW = 24
PROMPTS = [
    ("caf\u00e9 " if index % 3 else CHINESE) + " ".join(f"word{k}" for k in range(index % 7 + 1))
    for index in range(20)
]


@pytest.fixture(scope="module", params=["plain", "tied"])
def case(
    request: pytest.FixtureRequest,
    tiny: Path,
    tiny_tied: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    """A checkpoint that stops at more tokens than Llama, and an adapter that PEFT wrote."""
    folder = tmp_path_factory.mktemp(request.param)
    base, adapter = folder / "base", folder / "adapter"
    shutil.copytree(tiny if request.param == "plain" else tiny_tied, base)
    config = json.loads((base / "generation_config.json").read_text(encoding="utf-8"))
    config["eos_token_id"] += list(range(40, 60))
    (base / "generation_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(5)
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    return base, make(base, adapter, std=0.3, r=4, lora_alpha=12, target_modules=targets)


@pytest.fixture(scope="module")
def oracle(case: Case) -> Oracle:
    """The answer of transformers with PEFT to messages."""
    base, adapter = case
    tokenizer = AutoTokenizer.from_pretrained(base)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)

    def answer(messages: list[dict[str, str]]) -> str:
        asked = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = peft.generate(**asked, do_sample=False, max_new_tokens=NEW)[0]
        return str(
            tokenizer.decode(
                tokens[asked["input_ids"].shape[1] :],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
        )

    return answer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def arguments(case: Case, *more: object) -> list[str]:
    base, adapter = case
    given = ["--model_name_or_path", base, "--adapter_name_or_path", adapter, *more]
    return [str(part) for part in (*given, "--max_new_tokens", NEW)]


def answers(case: Case, prompts: Path, *more: object) -> list[dict[str, Any]]:
    output = prompts.with_suffix(".answers.jsonl")
    assert main(arguments(case, "--prompts", prompts, "--output", output, *more)) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_a_file_of_prompts_is_answered_as_transformers_and_peft_do(
    case: Case, oracle: Oracle, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n\n".join(PROMPTS), encoding="utf-8")
    found = answers(case, prompts)
    expected = [oracle([user(prompt)]) for prompt in PROMPTS]
    assert [row["prompt"] for row in found] == PROMPTS
    assert [row["predict"] for row in found] == expected
    assert len(set(expected)) > 10
    tokens = load_tokenizer(case[0]).backend
    lengths = {len(tokens.encode(text, add_special_tokens=False).ids) for text in expected}
    assert min(lengths) < NEW / 2  # stop tokens are met


def test_one_prompt_is_printed_as_it_is_in_a_file(
    case: Case, oracle: Oracle, capsys: pytest.CaptureFixture[str]
) -> None:
    for prompt in PROMPTS[:2]:
        assert main(arguments(case, "--prompt", prompt)) == 0
        assert capsys.readouterr().out == oracle([user(prompt)]) + "\n"


def test_messages_and_the_system_message(case: Case, oracle: Oracle, tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    messages = [system, user("Hi"), {"role": "assistant", "content": "Yes?"}, user("Why?")]
    rows = [{"messages": messages, "label": "x"}, {"prompt": PROMPTS[3]}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    first, second = answers(case, prompts, "--system", "Answer in verse.")
    assert first == {**rows[0], "predict": oracle(messages)}
    verse = {"role": "system", "content": "Answer in verse."}
    assert second["predict"] == oracle([verse, user(PROMPTS[3])])
    assert second["predict"] != oracle([user(PROMPTS[3])])


def test_chat_remembers_until_it_is_cleared(
    case: Case, oracle: Oracle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nAnd now?\nclear\nAnd now?\nexit\nno\n"))
    assert main(arguments(case, "--interactive")) == 0
    first = oracle([user("Hello")])
    remembered = oracle([user("Hello"), {"role": "assistant", "content": first}, user("And now?")])
    cleared = oracle([user("And now?")])
    assert remembered != cleared
    assert capsys.readouterr().out == f"> {first}\n> > {remembered}\n> > {cleared}\n> "


def test_without_an_adapter_the_base_answers(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    base, _ = case
    given = ["--model_name_or_path", str(base), "--prompt", "Hello", "--max_new_tokens", "8"]
    assert main(given) == 0
    found = capsys.readouterr().out
    tokenizer, theirs = (
        AutoTokenizer.from_pretrained(base),
        AutoModelForCausalLM.from_pretrained(base),
    )
    asked = tokenizer.apply_chat_template(
        [user("Hello")], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = theirs.generate(**asked, do_sample=False, max_new_tokens=8)[0]
    expected = tokenizer.decode(tokens[asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found == expected + "\n"
    main(arguments(case, "--prompt", "Hello"))
    assert not capsys.readouterr().out.startswith(expected)


def test_the_seed_decides_what_is_drawn(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(seed: int) -> str:
        drawing = ("--temperature", 1.2, "--top_p", 0.95, "--seed", seed)
        assert main(arguments(case, "--prompt", "Once", *drawing)) == 0
        return capsys.readouterr().out

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_every_prompt_of_a_file_has_its_own_draws(case: Case, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once\n" * 2 * BATCH, encoding="utf-8")
    found = answers(case, prompts, "--temperature", 1.2)
    assert len({row["predict"] for row in found}) > BATCH + BATCH // 2


def test_characters_are_printed_whole_and_at_once(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(tiny)
    text = f"a{CHINESE} \U0001f600!"
    tokens = tokenizer.backend.encode(text, add_special_tokens=False).ids
    assert len(tokens) > 2 * len(CHINESE), "characters of several tokens are what this is about"
    pieces = list(stream(tokens, tokenizer.decode))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    for count in range(len(tokens)):  # what is whole has been shown
        assert "".join(pieces[:count]) == tokenizer.decode(tokens[:count]).rstrip("\ufffd")
    assert show(enumerate(tokens), tokenizer.decode) == text
    assert capsys.readouterr().out == text + "\n"


def test_an_answer_cut_inside_a_character_ends_as_the_decoder_says(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    tokens = tokenizer.backend.encode(CHINESE, add_special_tokens=False).ids[:-1]
    pieces = list(stream(tokens, tokenizer.decode))
    assert "".join(pieces) == tokenizer.decode(tokens) == CHINESE[:-1] + "\ufffd"
    assert "\ufffd" not in "".join(pieces[:-1])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt", "x", "--max_new_tokens", "0"], "--max_new_tokens must be at least 1"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature must be at least 0"),
        (["--prompt", "x", "--temperature", "nan"], "--temperature must be at least 0"),
        (["--prompt", "x", "--top_p", "0.9"], "need a --temperature above 0"),
        (["--prompt", "x", "--output", "new.jsonl"], "--prompts and --output need each other"),
        (["--prompts", "config.json", "--output", "new.jsonl"], "not a .txt or .jsonl"),
        (["--prompts", "bad.jsonl", "--output", "new.jsonl"], "bad.jsonl:2: neither a prompt nor"),
        (["--prompts", "bad.jsonl", "--output", "new.jsonl"], "bad.jsonl:3: questions and answers"),
        (["--prompts", "bad.jsonl", "--output", "bad.jsonl"], "bad.jsonl exists already"),
        (["--prompt", "x", "--template", "llama4"], "template: llama4 is not known"),
        (["--prompt", "word " * 40000, "--max_new_tokens", "131000"], "max_position_embeddings"),
        (["--prompt", "x", "--adapter_name_or_path", "."], "adapter_config.json: no such file"),
    ],
)
def test_wrong_requests_are_refused(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "x"}, {"text": "x"}, {"messages": [{"role": "assistant", "content": "x"}]}]
    Path("bad.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    assert main(["--model_name_or_path", ".", *more]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_larger_than_the_memory_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in tiny.glob("*.json"):
        shutil.copy(file, tmp_path)
    layers = 200
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config |= {"intermediate_size": 2**26, "num_hidden_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weight_map = {}
    for name, size in read_model_config(tmp_path).shape.parameter_shapes().items():
        count = 2 * math.prod(size)
        header = {name: {"dtype": "BF16", "shape": size, "data_offsets": [0, count]}}
        text = json.dumps(header).encode()
        with (tmp_path / f"{name}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + count)  # a hole, which takes no room on the disk
        weight_map[name] = f"{name}.safetensors"
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    assert main(["--model_name_or_path", str(tmp_path), "--prompt", "x"]) == 2
    needed = 3 * 8 * layers  # GiB of the MLPs in fp32; the rest is 0.0
    assert f"needs {needed}.0 GiB on the cpu in torch.float32" in capsys.readouterr().err
