"""A checkpoint's tokenizer: text to tokens, with special tokens only where they are meant."""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import tokenizers

from minilora.settings.errors import RequestError
from minilora.settings.text_files import read_json, read_text


@dataclass(frozen=True)
class Tokenizer:
    """What a checkpoint folder says about its tokens.

    backend: takes special tokens in a text for plain text, adds none, neither pads nor cuts.
    stop_ids: tokens that end an answer. named: texts of special tokens by their names in
    tokenizer_config.json (bos_token, ...). specials: ids of all special tokens by their texts.
    pattern: matches any of them; one group, so that `split` keeps them.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_id: int
    stop_ids: tuple[int, ...]
    chat_template: str | None
    named: Mapping[str, str]
    specials: Mapping[str, int]
    pattern: re.Pattern[str]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of these tokens."""
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, in parts that end where the trained text starts or ends.

    mark: a character that breaks up what looks like a special token but is not; "" for none.
    """

    parts: Sequence[str]
    mark: str = ""


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json and the files beside it that name special tokens and the chat template.

    Raises RequestError for a missing or broken file, or without an end-of-sequence token.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise RequestError([f"{path}: no such file; the checkpoint needs a fast tokenizer"])
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise RequestError([f"{path}: not a tokenizer: {error}"]) from None
    backend.no_padding()
    backend.no_truncation()
    backend.post_processor = None  # it adds a BOS, and trims white space off offsets
    backend.encode_special_tokens = True
    config = _read_if_there(folder / "tokenizer_config.json")
    named = _special_texts(_read_if_there(folder / "special_tokens_map.json") | config)
    added = backend.get_added_tokens_decoder()
    specials = {token.content: number for number, token in added.items() if token.special}
    problems = [
        f"{path}: has no special token {named[name]!r}, which tokenizer_config.json calls {name}"
        for name in ("bos_token", "eos_token")
        if name in named and named[name] not in specials
    ]
    if "eos_token" not in named:
        problems.append(f"{folder / 'tokenizer_config.json'}: says no eos_token")
    if problems:
        raise RequestError(problems)
    stops = _read_if_there(folder / "generation_config.json").get("eos_token_id") or []
    stops = stops if isinstance(stops, list) else [stops]
    if not all(type(stop) is int for stop in stops):
        raise RequestError([f"{folder / 'generation_config.json'}: eos_token_id: not a number"])
    tokenizer = Tokenizer(
        backend=backend,
        bos_id=specials.get(named.get("bos_token", "")),
        eos_id=specials[named["eos_token"]],
        stop_ids=tuple(sorted({specials[named["eos_token"]], *stops})),
        chat_template=_chat_template(folder, config),
        named=named,
        specials=specials,
        pattern=re.compile(
            f"({'|'.join(map(re.escape, sorted(specials, key=len, reverse=True)))})"
        ),
    )
    _check_pieces(tokenizer, path)
    return tokenizer


def _check_pieces(tokenizer: Tokenizer, path: Path) -> None:
    """Texts are encoded in pieces between special tokens; that must not change their tokens."""
    eos = tokenizer.named["eos_token"]
    text = f"{eos}\n\nA b{eos} c{eos}"
    ((found, _),) = encode(tokenizer, [Rendered([text])], joined=True)
    tokenizer.backend.encode_special_tokens = False
    expected = tokenizer.backend.encode(text, add_special_tokens=False).ids
    tokenizer.backend.encode_special_tokens = True
    if found != expected:
        raise RequestError([f"{path}: not supported: it encodes the start of a text differently"])


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name, from "bos_token": "<s>" or "bos_token": {"content": "<s>", ...}."""
    texts = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            texts[name] = text
    return texts


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template of tokenizer_config.json: a string, or a list."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    template = config.get("chat_template")
    for entry in template if isinstance(template, list) else ():
        if isinstance(entry, dict) and entry.get("name") == "default":
            template = entry.get("template")
    return template if isinstance(template, str) else None


def encode(
    tokenizer: Tokenizer, rows: Sequence[Rendered], joined: bool
) -> list[tuple[list[int], list[int]]]:
    """Tokens of every row, and how many of them there are up to the end of each of its parts.

    joined: whether a token may reach over the end of a part, as when the whole text is encoded at
    once (it then belongs to the part in which it starts); else every part is encoded alone. Each
    text between special tokens is encoded once, all in one batch call of the library.
    """
    plans = [_plan(tokenizer, row, joined) for row in rows]
    texts = {piece: None for pieces, _ in plans for piece in pieces if isinstance(piece, str)}
    batch = tokenizer.backend.encode_batch(list(texts), add_special_tokens=False)
    encodings = dict(zip(texts, batch, strict=True))
    ids = {text: encoding.ids for text, encoding in encodings.items()}
    result = []
    for pieces, cuts in plans:
        tokens: list[int] = []
        firsts = [0]  # tokens before each piece, and before the end
        for piece in pieces:
            tokens += ids[piece] if isinstance(piece, str) else [piece]
            firsts.append(len(tokens))
        ends = [
            firsts[at] + (_token_at(encodings[str(pieces[at])], char) if char else 0)
            for at, char in cuts
        ]
        result.append((tokens, ends))
    return result


def _plan(
    tokenizer: Tokenizer, row: Rendered, joined: bool
) -> tuple[list[str | int], list[tuple[int, int]]]:
    """A row as ids of special tokens and plain texts between them, and where its parts end.

    A part ends at (piece, characters into that piece).
    """
    pieces: list[str | int] = []
    written: list[str] = []  # the same pieces with their marks
    starts = [0]
    for text in ["".join(row.parts)] if joined else row.parts:
        for index, piece in enumerate(tokenizer.pattern.split(text)):
            if piece:
                plain = piece.replace(row.mark, "")
                pieces.append(tokenizer.specials[piece] if index % 2 else plain)
                written.append(piece)
                starts.append(starts[-1] + len(piece))
    written.append("")
    cuts = []
    for end in accumulate(map(len, row.parts)):
        at = bisect_right(starts, end) - 1
        cuts.append((at, len(written[at][: end - starts[at]].replace(row.mark, ""))))
    return pieces, cuts


def _token_at(encoding: tokenizers.Encoding, char: int) -> int:
    """The first token that starts at this character or after it."""
    token = encoding.char_to_token(char)
    span = None if token is None else encoding.token_to_chars(token)
    assert token is not None and span is not None, f"no token at character {char}"
    return token + (span[0] < char)
