"""A checkpoint's tokenizer: text to tokens, with special tokens only where they are meant.

A chat template writes the special tokens of a conversation ("<|eot_id|>") into its text, and there
they must become special tokens. A user may write the same characters into a question, and there
they must stay plain text: else a row of data could end its own turn and begin a system message. In
the finished text the two look the same, so they are told apart before the template is rendered:

1. `mark_specials` puts a mark into what looks like a special token in the users' texts, after its
   first character. The mark is a private-use character of Unicode that neither these texts nor
   the template have.
2. The template is rendered with the marked texts. Its own special tokens have no mark.
3. `encode` cuts the rendered text at the special tokens, which now are the template's alone, takes
   the marks out of the texts between them, and encodes these as plain text.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import tokenizers

from minilora.data.conversations import BadRow
from minilora.data.tokenizer_files import TokenizerFiles, read_tokenizer_files
from minilora.settings.errors import RequestError
from minilora.settings.text_files import read_json

PRIVATE_USE = range(0xE000, 0xF900)  # the characters that Unicode leaves to every program


@dataclass(frozen=True)
class Tokenizer:
    """What a checkpoint folder says about its tokens.

    backend: the library's tokenizer. It reads special tokens in a text as plain text, adds none of
        its own, and neither pads nor truncates.
    bos_id: the token that starts a document, None where the model has none.
    eos_id: the token that ends a document. stop_ids: all tokens that end an answer, sorted.
    chat_template: jinja2 source, None where the checkpoint has none.
    named: texts of special tokens by their names in tokenizer_config.json (bos_token, ...).
    specials: ids of all special tokens by their texts.
    pattern: matches any of these texts; in one group, so that `pattern.split` keeps them.
    files: what all of this was read from; copies of them lie beside each adapter.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_id: int
    stop_ids: tuple[int, ...]
    chat_template: str | None
    named: Mapping[str, str]
    specials: Mapping[str, int]
    pattern: re.Pattern[str]
    files: TokenizerFiles

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of these tokens."""
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, in parts that end where the trained text starts or ends.

    mark: what `mark_specials` put into the texts; "" where it put nothing.
    """

    parts: Sequence[str]
    mark: str = ""


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json and the files beside it that name special tokens and the chat template.

    Each file is read once, and this is the only function that reads them. Raises RequestError for
    a missing or broken file, or without an end-of-sequence token.
    """
    files = read_tokenizer_files(folder)
    backend = _load_backend(files)
    specials = {
        token.content: number
        for number, token in backend.get_added_tokens_decoder().items()
        if token.special
    }
    # Of special tokens that begin alike the longest is tried first: the first match is taken.
    longest_first = sorted(specials, key=len, reverse=True)

    # Older checkpoints name their special tokens in a file of their own.
    config = files.json("tokenizer_config.json")
    named = _special_texts(files.json("special_tokens_map.json") | config)
    _check_named(folder, named, specials)
    eos_id = specials[named["eos_token"]]
    tokenizer = Tokenizer(
        backend=backend,
        bos_id=specials.get(named.get("bos_token", "")),
        eos_id=eos_id,
        stop_ids=tuple(sorted({eos_id, *_generation_stops(folder)})),
        chat_template=_chat_template(files, config),
        named=named,
        specials=specials,
        pattern=re.compile(f"({'|'.join(map(re.escape, longest_first))})"),
        files=files,
    )
    _check_pieces(tokenizer, folder / "tokenizer.json")
    return tokenizer


def mark_specials(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[list[str], str]:
    """These texts with a mark in everything that looks like a special token, and the mark.

    The mark is one for all texts, and in none of them; it is "" if no text needs it. Raises BadRow
    if every private-use character is in them.
    """
    if not any(tokenizer.pattern.search(text) for text in texts):
        return list(texts), ""
    used = set(tokenizer.chat_template or "").union(*texts)
    mark = next((character for character in map(chr, PRIVATE_USE) if character not in used), None)
    if mark is None:
        raise BadRow("a text has a special token and every private-use character of Unicode")

    def with_mark(match: re.Match[str]) -> str:
        return match[0][0] + mark + match[0][1:]

    return [tokenizer.pattern.sub(with_mark, text) for text in texts], mark


def encode(
    tokenizer: Tokenizer, rows: Sequence[Rendered], joined: bool
) -> list[tuple[list[int], list[int]]]:
    """Tokens of every row, and how many of them there are up to the end of each of its parts.

    joined: whether a token may reach over the end of a part, as when the whole text is encoded at
    once (it then belongs to the part in which it starts); else every part is encoded alone.
    """
    # Each text between special tokens is encoded once, however often it occurs, and all in one
    # call of the library, which spreads them over the cores.
    cut_rows = [_cut(tokenizer, row, joined) for row in rows]
    texts = {piece: None for pieces, _ in cut_rows for piece in pieces if isinstance(piece, str)}
    batch = tokenizer.backend.encode_batch(list(texts), add_special_tokens=False)
    encodings = dict(zip(texts, batch, strict=True))
    ids = {text: encoding.ids for text, encoding in encodings.items()}

    result = []
    for pieces, part_ends in cut_rows:
        tokens: list[int] = []
        tokens_before = [0]  # each piece, and then the end
        for piece in pieces:
            tokens += ids[piece] if isinstance(piece, str) else [piece]
            tokens_before.append(len(tokens))

        ends = []
        for index, characters in part_ends:
            end = tokens_before[index]
            if characters > 0:  # the part ends inside this piece
                piece = pieces[index]
                end += _tokens_up_to(encodings[piece], characters) if isinstance(piece, str) else 1
            ends.append(end)
        result.append((tokens, ends))
    return result


def _cut(
    tokenizer: Tokenizer, row: Rendered, joined: bool
) -> tuple[list[str | int], list[tuple[int, int]]]:
    """A row as ids of special tokens and the plain texts between them, and where its parts end.

    A part ends so many characters into a piece: (index of the piece, characters).
    """
    # Where a part ends is known in the text that was rendered, so with the marks in it.
    pieces: list[str | int] = []
    marked_pieces: list[str] = []
    starts = [0]  # of each piece in the marked text, and then its end
    for text in ["".join(row.parts)] if joined else row.parts:
        for index, piece in enumerate(tokenizer.pattern.split(text)):
            if piece == "":
                continue
            is_special = index % 2 == 1  # split returns text, special, text, special, ..., text
            pieces.append(tokenizer.specials[piece] if is_special else _unmarked(piece, row.mark))
            marked_pieces.append(piece)
            starts.append(starts[-1] + len(piece))

    marked_pieces.append("")  # the last part ends no character into this one
    part_ends = []
    for end in accumulate(len(part) for part in row.parts):
        index = bisect_right(starts, end) - 1
        before = marked_pieces[index][: end - starts[index]]
        part_ends.append((index, len(_unmarked(before, row.mark))))
    return pieces, part_ends


def _unmarked(text: str, mark: str) -> str:
    """The text without the marks; "" is no mark."""
    return text.replace(mark, "") if mark else text


def _tokens_up_to(encoding: tokenizers.Encoding, characters: int) -> int:
    """How many of its tokens start in the first so many characters."""
    token = encoding.char_to_token(characters)
    span = None if token is None else encoding.token_to_chars(token)
    assert token is not None and span is not None, f"no token at character {characters}"
    starts_before = span[0] < characters
    return token + 1 if starts_before else token


def _load_backend(files: TokenizerFiles) -> tokenizers.Tokenizer:
    """The library's tokenizer, set to encode plain text and nothing else. Raises RequestError."""
    path = files.folder / "tokenizer.json"
    if path.name not in files.contents:
        raise RequestError([f"{path}: no such file; the checkpoint needs a fast tokenizer"])
    try:
        backend = tokenizers.Tokenizer.from_buffer(files.contents[path.name])
    except Exception as error:  # the library raises nothing more precise
        raise RequestError([f"{path}: not a tokenizer: {error}"]) from None
    backend.no_padding()
    backend.no_truncation()
    backend.post_processor = None  # it adds a BOS, and trims white space off offsets
    backend.encode_special_tokens = True  # that is: encode their characters as plain text
    return backend


def _check_named(folder: Path, named: Mapping[str, str], specials: Mapping[str, int]) -> None:
    """Raises RequestError if the tokens that start and end a document are not in the tokenizer."""
    problems = []
    for name in ("bos_token", "eos_token"):
        if name in named and named[name] not in specials:
            problems.append(
                f"{folder / 'tokenizer.json'}: has no special token {named[name]!r}, which "
                f"tokenizer_config.json calls {name}"
            )
    if "eos_token" not in named:
        problems.append(f"{folder / 'tokenizer_config.json'}: names no eos_token")
    if problems:
        raise RequestError(problems)


def _generation_stops(folder: Path) -> list[int]:
    """The tokens that end an answer by generation_config.json, which may be one or a list."""
    path = folder / "generation_config.json"
    stops = (read_json(path) if path.is_file() else {}).get("eos_token_id") or []
    if not isinstance(stops, list):
        stops = [stops]
    if not all(type(stop) is int for stop in stops):
        raise RequestError([f"{path}: eos_token_id: not a number"])
    return stops


def _check_pieces(tokenizer: Tokenizer, path: Path) -> None:
    """Texts are encoded in pieces between special tokens; that must not change their tokens."""
    eos = tokenizer.named["eos_token"]
    text = f"{eos}\n\nA b{eos} c{eos}"
    ((found, _),) = encode(tokenizer, [Rendered([text])], joined=True)

    tokenizer.backend.encode_special_tokens = False
    expected = tokenizer.backend.encode(text, add_special_tokens=False).ids
    tokenizer.backend.encode_special_tokens = True
    if found != expected:
        raise RequestError(
            [
                f"{path}: not supported: this tokenizer encodes the start of a text differently "
                "from the same words after a special token"
            ]
        )


def _special_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name, from "bos_token": "<s>" or "bos_token": {"content": "<s>", ...}."""
    texts = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            texts[name] = text
    return texts


def _chat_template(files: TokenizerFiles, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template of tokenizer_config.json: a string, or a list.

    Of a list it is the entry named `default`; the others are for tools or retrieval.
    """
    if "chat_template.jinja" in files.contents:
        return files.text("chat_template.jinja")
    template = config.get("chat_template")
    for entry in template if isinstance(template, list) else ():
        if isinstance(entry, dict) and entry.get("name") == "default":
            template = entry.get("template")
    return template if isinstance(template, str) else None
