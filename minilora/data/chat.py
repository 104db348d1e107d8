"""Conversations and plain texts as tokens, with the tokens that are trained."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from minilora.data.chat_templates import Llama3, OwnTemplate
from minilora.data.conversations import ANSWERS, BadRow, Conversation, Turn
from minilora.data.datasets import Tally
from minilora.data.documents import Encoded, Int32s
from minilora.data.tokenizer import Rendered, Tokenizer, encode, mark_specials
from minilora.settings.errors import RequestError
from minilora.settings.terminal import progress_bar

CHUNK = 4096  # conversations per batch call of the tokenizer
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA3_STOPS = ("<|eot_id|>", "<|eom_id|>")


@dataclass(frozen=True)
class Template:
    """How a model reads conversations.

    default_system: the system message of conversations that have none, or an empty one.
    stop_ids: tokens that end an answer.
    """

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

        Answers are trained with what ends them. A conversation that is too long is cut by
        `truncate`, and left out if nothing to train is left of it; both are counted.
        Raises RequestError if too many are left out.
        """
        encoded: list[Encoded] = []
        dropped: list[tuple[str, str]] = []  # (reason, place)
        cut: list[int] = []
        for chunk in _chunks(conversations):
            rendered: list[Rendered] = []
            sources: list[str] = []
            for conversation in chunk:
                try:
                    rendered.append(self._render(conversation.turns))
                except BadRow as error:
                    dropped.append((str(error), conversation.source))
                else:
                    sources.append(conversation.source)
            rows = encode(self.tokenizer, rendered, self.renderer.joined)

            for (ids, ends), source in zip(rows, sources, strict=True):
                whole = np.array(ids, dtype=np.int32)
                tokens, trained = truncate(
                    whole,
                    ends,
                    cutoff_len=cutoff_len,
                    train_on_prompt=train_on_prompt,
                    mask_history=mask_history,
                )
                if not trained[1:].any():  # no token stands before the first one to predict it
                    dropped.append((f"no answer left within cutoff_len {cutoff_len}", source))
                    continue
                encoded.append((tokens, trained))
                if len(tokens) < len(whole):
                    cut.append(len(whole) - len(tokens))
        return encoded, Tally.of(len(encoded), dropped, cut)

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Tokens up to where the next answer starts. Raises ValueError if an answer is last."""
        if not turns or turns[-1].role in ANSWERS:
            raise ValueError("a prompt ends with a question")
        ((tokens, _),) = encode(self.tokenizer, [self._render(turns)], self.renderer.joined)
        return tokens

    def _render(self, turns: Sequence[Turn]) -> Rendered:
        """The text of a conversation; special tokens in the texts of its turns are marked."""
        has_system = turns[0].role == "system"
        if self.default_system and not (has_system and turns[0].text):
            rest = turns[1:] if has_system else turns
            turns = [Turn("system", self.default_system), *rest]

        texts, mark = mark_specials(self.tokenizer, [turn.text for turn in turns])
        marked = [Turn(turn.role, text) for turn, text in zip(turns, texts, strict=True)]
        return Rendered(self.renderer.parts(marked), mark)


def make_template(
    name: str | None, tokenizer: Tokenizer, default_system: str | None = None
) -> Template:
    """The template `llama3`, or for None the checkpoint's own.

    Raises RequestError for another name, or if the checkpoint lacks what the template needs.
    """
    if name is None:
        if tokenizer.chat_template is None:
            raise _template_error("the checkpoint has no chat template; say template: llama3")
        own = OwnTemplate(tokenizer.chat_template, tokenizer.named)
        return Template(tokenizer, own, default_system, tokenizer.stop_ids)

    if name != "llama3":
        close = difflib.get_close_matches(name, ["llama3"])
        hint = " (did you mean llama3?)" if close else ""
        raise _template_error(
            f"{name} is not known{hint}; say llama3, or remove the key for the checkpoint's own"
        )

    missing = [token for token in LLAMA3_TOKENS if token not in tokenizer.specials]
    if missing or tokenizer.bos_id is None:
        lacks = ", ".join(missing) or "a bos_token"
        raise _template_error(f"llama3 does not fit the tokenizer, which lacks {lacks}")
    stops = {tokenizer.specials[token] for token in LLAMA3_STOPS if token in tokenizer.specials}
    stop_ids = tuple(sorted({*tokenizer.stop_ids, *stops}))
    return Template(tokenizer, Llama3(tokenizer.named["bos_token"]), default_system, stop_ids)


def _template_error(problem: str) -> RequestError:
    """A problem with the key `template`."""
    return RequestError([f"template: {problem}"])


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
                if len(piece) > 1:  # a single token has nothing before it to be predicted from
                    encoded.append((piece, np.ones(len(piece), dtype=np.bool_)))
    return encoded


def _chunks(conversations: Sequence[Conversation]) -> Iterator[Sequence[Conversation]]:
    """CHUNK at a time, with a progress bar where it takes more than five seconds."""
    total = len(conversations)
    with progress_bar(total, "row", desc="tokenising", delay=5) as bar:
        for begin in range(0, total, CHUNK):
            yield conversations[begin : begin + CHUNK]
            bar.update(min(CHUNK, total - begin))


def truncate(
    tokens: Int32s,
    ends: Sequence[int],
    *,
    cutoff_len: int,
    train_on_prompt: bool,
    mask_history: bool,
) -> Encoded:
    """At most cutoff_len of a conversation's tokens, and which of them are trained.

    tokens: (N,) int32. ends: where its parts end: source, answer, source, answer, ...

    Turn by turn, source and answer are cut to what `split_room` gives them of the room that is
    left. With mask_history the last turn goes first, and only its answer is trained.
    Source: LLaMA-Factory, data/processor/supervised.py.
    """
    edges = [0, *ends]
    turns = list(zip(edges[0::2], edges[1::2], edges[2::2], strict=False))
    if mask_history:
        turns.reverse()

    pieces_of_turns: list[list[tuple[Int32s, bool]]] = []
    room = cutoff_len
    for start, middle, end in turns:
        if room <= 0:
            break
        source, answer = split_room(middle - start, end - middle, room)
        room -= source + answer
        is_history = mask_history and len(pieces_of_turns) > 0
        question = (tokens[start : start + source], train_on_prompt)
        reply = (tokens[middle : middle + answer], not is_history)
        pieces_of_turns.append([question, reply])

    if mask_history:
        pieces_of_turns.reverse()
    pieces = [piece for turn in pieces_of_turns for piece in turn]
    trained = np.repeat([is_trained for _, is_trained in pieces], [len(ids) for ids, _ in pieces])
    return np.concatenate([ids for ids, _ in pieces]), trained


def split_room(source: int, answer: int, room: int) -> tuple[int, int]:
    """How many tokens of a source and of its answer are kept in `room` tokens.

    Of the two, one that is shorter than half of the room is kept whole, the answer first; where
    both are longer, they share the room in proportion to their lengths.
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
    """The text of a document; what is trained is green, or without colour in [[ ]]."""
    before, after = ("\x1b[32m", "\x1b[0m") if colour else ("[[", "]]")
    text = ""
    for is_trained, run in groupby(zip(*encoded, strict=True), key=lambda pair: bool(pair[1])):
        words = tokenizer.decode([int(token) for token, _ in run])
        text += f"{before}{words}{after}" if is_trained else words
    return text
