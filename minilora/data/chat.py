"""Conversations and plain texts as tokens, with the tokens that are trained."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from minilora.data.chat_templates import OwnTemplate
from minilora.data.conversations import ANSWERS, BadRow, Conversation, Turn
from minilora.data.datasets import Tally
from minilora.data.documents import Encoded, Int32s
from minilora.data.lost_text import check_nothing_lost
from minilora.data.named_templates import NAMED, Renderer
from minilora.data.tokenizer import Rendered, Tokenizer, encode, mark_specials
from minilora.settings.errors import RequestError
from minilora.settings.terminal import progress_bar

CHUNK = 4096  # conversations per batch call of the tokenizer
MOST_NAMES = 5  # of special tokens that the summary lists


@dataclass(frozen=True)
class Template:
    """How a model reads conversations.

    default_system: the system message of conversations that have none, or an empty one.
    stop_ids: tokens that end an answer.
    split_special_tokens: whether what looks like a special token in a text stays plain characters.
    """

    tokenizer: Tokenizer
    renderer: Renderer
    default_system: str | None
    stop_ids: tuple[int, ...]
    split_special_tokens: bool = True

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
            used: list[Conversation] = []
            for conversation in chunk:
                try:
                    one = self._render(conversation.turns)
                    check_nothing_lost(conversation.turns, one)
                except BadRow as error:
                    dropped.append((str(error), conversation.source))
                else:
                    rendered.append(one)
                    used.append(conversation)
            rows = encode(self.tokenizer, rendered, self.renderer.joined)

            for (ids, ends), conversation in zip(rows, used, strict=True):
                whole = np.array(ids, dtype=np.int32)
                learned = [turn.trained for turn in conversation.turns if turn.role in ANSWERS]
                tokens, trained = truncate(
                    whole,
                    ends,
                    cutoff_len=cutoff_len,
                    train_on_prompt=train_on_prompt,
                    mask_history=mask_history,
                    learned=learned,
                )
                if not trained[1:].any():  # no token stands before the first one to predict it
                    reason = f"no answer left within cutoff_len {cutoff_len}"
                    if not any(learned[-1:] if mask_history else learned):
                        reason = "no answer to learn: their weight is 0"
                    dropped.append((reason, conversation.source))
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

        if not self.split_special_tokens:
            return Rendered(self.renderer.parts(turns))
        given = [text for turn in turns for text in (turn.text, turn.before_calls)]
        texts, mark = mark_specials(self.tokenizer, given)
        marked = [
            replace(turn, text=text, before_calls=before)
            for turn, text, before in zip(turns, texts[0::2], texts[1::2], strict=True)
        ]
        return Rendered(self.renderer.parts(marked), mark)


def make_template(
    name: str | None,
    tokenizer: Tokenizer,
    default_system: str | None = None,
    split_special_tokens: bool = True,
) -> Template:
    """A template of LLaMA-Factory's by its name, or for None the checkpoint's own.

    default_system: takes the place of the named template's.
    Raises RequestError for another name, or if the checkpoint lacks what the template needs.
    """
    if name is None:
        if tokenizer.chat_template is None:
            raise _template_error("the checkpoint has no chat template; say template: llama3")
        own = OwnTemplate(tokenizer.chat_template, tokenizer.named)
        return Template(tokenizer, own, default_system, tokenizer.stop_ids, split_special_tokens)

    if name not in NAMED:
        close = difflib.get_close_matches(name, NAMED, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        known = ", ".join(NAMED)
        raise _template_error(
            f"{name} is not known{hint}; say one of {known}, or remove the key for the "
            "checkpoint's own"
        )

    template = NAMED[name]
    missing = [token for token in template.tokens if token not in tokenizer.specials]
    if missing or (template.needs_bos and tokenizer.bos_id is None):
        lacks = ", ".join(missing) or "a bos_token"
        raise _template_error(f"{name} does not fit the tokenizer, which lacks {lacks}")
    stops = {tokenizer.specials[token] for token in template.stops if token in tokenizer.specials}
    stop_ids = tuple(sorted({*tokenizer.stop_ids, *stops}))
    system = template.default_system if default_system is None else default_system
    renderer = template.renderer(tokenizer.named)
    return Template(tokenizer, renderer, system, stop_ids, split_special_tokens)


def _template_error(problem: str) -> RequestError:
    """A problem with the key `template`."""
    return RequestError([f"template: {problem}"])


def encode_texts(
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    cutoff_len: int,
    split_special_tokens: bool = True,
) -> list[Encoded]:
    """For stage pt: BOS, the text and EOS, all trained, cut into pieces of cutoff_len tokens.

    EOS is <|end_of_text|> where there is one, as in Llama's own training and in LLaMA-Factory.
    split_special_tokens: see `Template`.
    """
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = tokenizer.specials.get("<|end_of_text|>", tokenizer.eos_id)

    encoded: list[Encoded] = []
    for chunk in _chunks(conversations):
        texts = [turn.text for conversation in chunk for turn in conversation.turns]
        if split_special_tokens:
            batch = tokenizer.backend.encode_batch(texts, add_special_tokens=False)
            rows = [encoding.ids for encoding in batch]
        else:
            rows = [ids for ids, _ in encode(tokenizer, [Rendered([t]) for t in texts], True)]
        for ids in rows:
            tokens = np.array([*start, *ids, end], dtype=np.int32)
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


def special_text_note(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], split_special_tokens: bool
) -> tuple[str, ...]:
    """A line about rows that hold the text of special tokens, and what becomes of it; or none."""
    rows = 0
    found: dict[str, None] = {}  # in the order in which they are met
    for conversation in conversations:
        texts = (text for turn in conversation.turns for text in (turn.text, turn.before_calls))
        tokens = [token for text in texts for token in tokenizer.pattern.findall(text)]
        rows += bool(tokens)
        found |= dict.fromkeys(tokens)
    if not rows:
        return ()

    names = ", ".join([*list(found)[:MOST_NAMES], *(["..."] if len(found) > MOST_NAMES else [])])
    fate = "are plain characters; with split_special_tokens: false they are special tokens"
    if not split_special_tokens:
        fate = "are special tokens (split_special_tokens: false)"
    holds = "row holds" if rows == 1 else "rows hold"
    return (f"{rows} {holds} the text of special tokens ({names}), which {fate}",)


def truncate(
    tokens: Int32s,
    ends: Sequence[int],
    *,
    cutoff_len: int,
    train_on_prompt: bool,
    mask_history: bool,
    learned: Sequence[bool],
) -> Encoded:
    """At most cutoff_len of a conversation's tokens, and which of them are trained.

    tokens: (N,) int32. ends: where its parts end: source, answer, source, answer, ...
    learned: whether each answer is to be learned at all.

    Turn by turn, source and answer are cut to what `split_room` gives them of the room that is
    left. With mask_history the last turn goes first, and only its answer is trained.
    Source: LLaMA-Factory, data/processor/supervised.py.
    """
    edges = [0, *ends]
    turns = list(zip(edges[0::2], edges[1::2], edges[2::2], learned, strict=False))
    if mask_history:
        turns.reverse()

    pieces_of_turns: list[list[tuple[Int32s, bool]]] = []
    room = cutoff_len
    for start, middle, end, is_learned in turns:
        if room <= 0:
            break
        source, answer = split_room(middle - start, end - middle, room)
        room -= source + answer
        is_history = mask_history and len(pieces_of_turns) > 0
        question = (tokens[start : start + source], train_on_prompt)
        reply = (tokens[middle : middle + answer], is_learned and not is_history)
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
