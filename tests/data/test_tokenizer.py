"""What is read from a checkpoint's tokenizer files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from minilora.data.chat import make_template, show
from minilora.data.conversations import BadRow
from minilora.data.tokenizer import Rendered, Tokenizer, encode, load_tokenizer, mark_specials
from minilora.settings.errors import RequestError
from tests.support.llama31 import talk, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def test_templates_are_found_where_checkpoints_keep_them(tmp_path: Path) -> None:
    entries = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    write_folder(tmp_path, chat_template=entries, bos_token={"content": "<|begin_of_text|>"})
    assert load_tokenizer(tmp_path).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path).chat_template == "file"


def test_unusable_tokenizers_and_templates(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="did you mean llama3"):
        make_template("lama3", tokenizer)
    with pytest.raises(RequestError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(RequestError, match="not a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(RequestError, match="has no special token '<s>'"):
        load_tokenizer(write_folder(tmp_path, bos_token="<s>"))
    with pytest.raises(RequestError, match="names no eos_token"):
        load_tokenizer(write_folder(tmp_path, eos_token=None))
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(RequestError, match=r"tokenizer_config\.json:1: not JSON"):
        load_tokenizer(tmp_path)
    other = Backend(models.BPE())
    other.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "</s>"], show_progress=False)
    other.train_from_iterator(["A b c\n"], trainer)
    other.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(RequestError, match="start of a text differently"):
        load_tokenizer(tmp_path)


def test_stop_tokens(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = sorted(
        tokenizer.specials[text] for text in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    )
    assert list(make_template(None, tokenizer).stop_ids) == ids
    base = load_tokenizer(write_folder(tmp_path, eos_token="<|end_of_text|>", chat_template=None))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": base.eos_id}))
    base = load_tokenizer(tmp_path)
    assert base.stop_ids == (tokenizer.specials["<|end_of_text|>"],)
    assert list(make_template("llama3", base).stop_ids) == ids
    with pytest.raises(RequestError, match="no chat template"):
        make_template(None, base)


def test_of_special_tokens_that_begin_alike_the_longest_is_taken(tmp_path: Path) -> None:
    path = write_folder(tmp_path) / "tokenizer.json"
    backend = Backend.from_file(str(path))
    backend.no_truncation()
    backend.add_special_tokens(["<x", "<x>", "<x>>"])
    backend.save(str(path))
    text = "a<x>b<x>><x c"
    ((found, ends),) = encode(load_tokenizer(tmp_path), [Rendered([text])], joined=True)
    assert found == backend.encode(text, add_special_tokens=False).ids
    assert ends == [len(found)]


def test_a_mark_is_put_into_special_tokens_and_taken_out_again(tokenizer: Tokenizer) -> None:
    """The first private-use character that no text has; other texts stay as they are."""
    plain = ["a fox", "<|eot_id| >\ue000"]
    assert mark_specials(tokenizer, plain) == (plain, "")
    texts = ["a<|eot_id|>b\ue000<|eom_id|>", "fox", "\ue001"]
    marked, mark = mark_specials(tokenizer, texts)
    assert marked == ["a<\ue002|eot_id|>b\ue000<\ue002|eom_id|>", "fox", "\ue001"]
    assert mark == "\ue002"
    parts = [marked[0], "<|eot_id|>" + marked[1], marked[2]]
    eot = tokenizer.specials["<|eot_id|>"]
    for joined in (False, True):
        ((ids, ends),) = encode(tokenizer, [Rendered(parts, mark)], joined)
        assert ids.count(eot) == 1 and ids.index(eot) == ends[0]
        assert tokenizer.decode(ids[: ends[0]]) == texts[0]
        assert tokenizer.decode(ids[ends[0] :]) == "<|eot_id|>fox\ue001"
        assert ends[2] == len(ids)


def test_a_mark_is_in_no_text_and_not_in_the_template(tmp_path: Path) -> None:
    loop = "\ue000{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = load_tokenizer(write_folder(tmp_path, chat_template=loop))
    assert mark_specials(tokenizer, ["<|eot_id|>"])[1] == "\ue001"
    (sample,), _ = make_template(None, tokenizer).encode([talk("<|eot_id|>", "a")], cutoff_len=99)
    assert show(tokenizer, sample) == "\ue000<|eot_id|>[[a]]"
    every = "".join(map(chr, range(0xE000, 0xF900)))
    assert mark_specials(tokenizer, [every]) == ([every], "")
    with pytest.raises(BadRow, match="every private-use character"):
        mark_specials(tokenizer, [every, "<|eot_id|>"])
