"""Conversations and plain texts as tokens, with the tokens that are trained."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from minilora.data.chat_templates import Llama3, OwnTemplate
from minilora.data.conversations import ANSWERS, BadRow, Conversation, Turn
from minilora.data.datasets import Tally
from minilora.data.documents import Bools, Int32s
from minilora.data.tokenizer import Rendered, Tokenizer, encode
from minilora.settings.errors import RequestError
from minilora.settings.terminal import progress_bar

Encoded = tuple[Int32s, Bools]
CHUNK = 4096  # conversations per batch call of the tokenizer
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA3_STOPS = ("<|eot_id|>", "<|eom_id|>")


@dataclass(frozen=True)
class Template:
    """How a model reads conversations. stop_ids: tokens that end an answer."""

    tokenizer: Tokenizer
    renderer: Llama3 | OwnTemplate
    default_system: str | None
    stop_ids: tuple[int, ...]

    def encode(
        self,
        conversations: Sequence[Conversation],
        *,
        cutoff_len: int,
        train_on_prompt: bool = False,
        mask_history: bool = False,
    ) -> tuple[list[Encoded], Tally]:
        """Per conversation its tokens (N,) int32, and whether each is trained (N,) bool.

        Answers are trained with what ends them. Too long conversations are cut as LLaMA-Factory
        does it, each by `fit`; those without a target then are left out; both are counted.
        Raises RequestError if too many are left out.
        """
        encoded: list[Encoded] = []
        dropped: list[tuple[str, str]] = []
        cut: list[int] = []
        for chunk in _chunks(conversations):
            rendered: list[tuple[Rendered, str]] = []
            for conversation in chunk:
                try:
                    rendered.append((self._render(conversation.turns), conversation.source))
                except BadRow as error:
                    dropped.append((str(error), conversation.source))
            rows = encode(self.tokenizer, [row for row, _ in rendered], self.renderer.joined)
            for (tokens, ends), (_, source) in zip(rows, rendered, strict=True):
                result = fit(
                    np.array(tokens, dtype=np.int32),
                    ends,
                    cutoff_len=cutoff_len,
                    train_on_prompt=train_on_prompt,
                    mask_history=mask_history,
                )
                if result[1][1:].any():
                    encoded.append(result)
                    cut += [len(tokens) - len(result[0])] * (len(tokens) > len(result[0]))
                else:
                    dropped.append((f"no answer left within cutoff_len {cutoff_len}", source))
        return encoded, Tally.of(len(encoded), dropped, cut)

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Tokens up to where the next answer starts. Raises ValueError if an answer is last."""
        if not turns or turns[-1].role in ANSWERS:
            raise ValueError("a prompt ends with a question")
        ((tokens, _),) = encode(self.tokenizer, [self._render(turns)], self.renderer.joined)
        return tokens

    def _render(self, turns: Sequence[Turn]) -> Rendered:
        """The text of a conversation; what its turns have of special tokens is broken by a mark."""
        first, rest = (turns[0].text, turns[1:]) if turns[0].role == "system" else ("", turns)
        if self.default_system and not first:
            turns = (Turn("system", self.default_system), *rest)
        pattern = self.tokenizer.pattern
        if not any(pattern.search(turn.text) for turn in turns):
            return Rendered(self.renderer.parts(turns))
        used = set().union(*(turn.text for turn in turns))
        mark = next(char for char in map(chr, range(0xE000, 0xF900)) if char not in used)

        def broken(match: re.Match[str]) -> str:
            return match[0][0] + mark + match[0][1:]

        marked = [Turn(turn.role, pattern.sub(broken, turn.text)) for turn in turns]
        return Rendered(self.renderer.parts(marked), mark)


def make_template(
    name: str | None, tokenizer: Tokenizer, default_system: str | None = None
) -> Template:
    """The template `llama3`, or for None the checkpoint's own.

    Raises RequestError for another name, or if the checkpoint lacks what the template needs.
    """
    specials = tokenizer.specials
    missing = [token for token in LLAMA3_TOKENS if token not in specials]
    if name is None and tokenizer.chat_template is not None:
        own = OwnTemplate(tokenizer.chat_template, tokenizer.named)
        return Template(tokenizer, own, default_system, tokenizer.stop_ids)
    if name is None:
        problem = "the checkpoint has no chat template; say template: llama3"
    elif name != "llama3":
        close = " (did you mean llama3?)" if difflib.get_close_matches(name, ["llama3"]) else ""
        problem = f"{name} is not known{close}; say llama3, or leave it out for the model's"
    elif missing or tokenizer.bos_id is None:
        lacks = ", ".join(missing) or "a bos_token"
        problem = f"llama3 does not fit the tokenizer, which lacks {lacks}"
    else:
        stops = {specials[token] for token in LLAMA3_STOPS if token in specials}
        stop_ids = tuple(sorted({*tokenizer.stop_ids, *stops}))
        return Template(tokenizer, Llama3(tokenizer.named["bos_token"]), default_system, stop_ids)
    raise RequestError([f"template: {problem}"])


def encode_texts(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], cutoff_len: int
) -> list[Encoded]:
    """For stage pt: BOS, the text and EOS, all trained, cut into pieces of cutoff_len tokens.

    EOS is <|end_of_text|> where there is one, as in Llama's own training and in LLaMA-Factory.
    """
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = tokenizer.specials.get("<|end_of_text|>", tokenizer.eos_id)
    encoded: list[Encoded] = []
    for chunk in _chunks(conversations):
        texts = [turn.text for conversation in chunk for turn in conversation.turns]
        for encoding in tokenizer.backend.encode_batch(texts, add_special_tokens=False):
            tokens = np.array([*start, *encoding.ids, end], dtype=np.int32)
            for at in range(0, len(tokens), cutoff_len):
                piece = tokens[at : at + cutoff_len]
                if len(piece) > 1:  # a lone token is nobody's target
                    encoded.append((piece, np.ones(len(piece), dtype=np.bool_)))
    return encoded


def _chunks(conversations: Sequence[Conversation]) -> Iterator[Sequence[Conversation]]:
    """CHUNK at a time, with a progress bar where it takes more than five seconds."""
    total = len(conversations)
    with progress_bar(total, "row", desc="tokenising", delay=5) as bar:
        for begin in range(0, total, CHUNK):
            yield conversations[begin : begin + CHUNK]
            bar.update(min(CHUNK, total - begin))


def fit(
    tokens: Int32s,
    ends: Sequence[int],
    *,
    cutoff_len: int,
    train_on_prompt: bool,
    mask_history: bool,
) -> Encoded:
    """At most cutoff_len of a conversation's tokens, and which of them are trained.

    ends: of source, answer, source, answer, ... Turn by turn both get their part of the room left;
    with mask_history the last turn goes first, and only its answer is trained.
    Source: LLaMA-Factory, data/processor/supervised.py.
    """
    edges = [0, *ends]
    turns = list(zip(edges[0::2], edges[1::2], edges[2::2], strict=False))
    pieces: list[tuple[Int32s, bool]] = []
    room = cutoff_len
    for start, middle, end in reversed(turns) if mask_history else turns:
        if room <= 0:
            break
        source, answer = shares(middle - start, end - middle, room)
        room -= source + answer
        question = (tokens[start : start + source], train_on_prompt)
        reply = (tokens[middle : middle + answer], not (mask_history and pieces))
        pieces = [question, reply, *pieces] if mask_history else [*pieces, question, reply]
    trained = np.repeat([learn for _, learn in pieces], [len(ids) for ids, _ in pieces])
    return np.concatenate([ids for ids, _ in pieces]), trained


def shares(source: int, answer: int, room: int) -> tuple[int, int]:
    """How many tokens of a source and of its answer are kept in `room` tokens.

    Source: LLaMA-Factory, data/processor/processor_utils.py, infer_seqlen.
    """
    if answer * 2 < room:
        most = room
    elif source * 2 < room:
        most = room - source
    else:
        most = int(room * (answer / (source + answer)))
    answer = min(most, answer)
    return min(room - answer, source), answer


def show(tokenizer: Tokenizer, encoded: Encoded, colour: bool = False) -> str:
    """The text of a sample; what is trained is green, or without colour in [[ ]]."""
    before, after = ("\x1b[32m", "\x1b[0m") if colour else ("[[", "]]")
    text = ""
    for learn, run in groupby(zip(*encoded, strict=True), key=lambda pair: bool(pair[1])):
        words = tokenizer.decode([int(token) for token, _ in run])
        text += f"{before}{words}{after}" if learn else words
    return text
