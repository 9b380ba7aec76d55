"""The rows of tokens that a language model's documents become.

A text is learnt from as a whole: every token but its first is predicted. Of a prompt with its response the response is.
Where the tokenizer has them, a token that begins a document and one that ends it stand around both; the end is
learnt. Prompt and response are tokenised apart and put together as they are, so that where the response begins does
not depend on what stands there. Of a chat, written by the tokenizer's template alone, the messages of some roles are
learnt (`data/chats.py`).

A text longer than a row is split into rows that share one token: the last of one is the first of the next, which is
read and not learnt, so that every token of a text but its first is predicted once. With `cut`, and for a response that
is too long, what does not fit is left out. A document without a token to learn from makes no row.

With `measured`, a row keeps its text, and where in it each token ends, for students with another tokenizer; of a chat
its messages too, and the text is of those that are learnt (`data/chat_texts.py`). A document that the tokenizer
changes, to lower case for example, has no such place, and is dropped.

A prompt that is asked is given to the teacher as its row stands up to the response. What the teacher wrote becomes rows
as other responses do; the end of one that did not come to it is not learnt.

Shapes: L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from raydistill.data.chat_texts import chat_bytes, chat_ends, learnt_texts
from raydistill.data.chats import (
    WRITER,
    Messages,
    Segment,
    asking,
    prompt_segments,
    read_messages,
    segments,
    written_messages,
)
from raydistill.data.documents import Document
from raydistill.data.duplicates import text_key
from raydistill.data.sources import Dropped, Reason
from raydistill.data.token_bytes import TokenBytes

CHUNK_DOCUMENTS = 256
NOTHING_LEARNT: Reason = "no token to learn from"
NO_ROOM: Reason = "no room for a response"
CHANGED: Reason = "a text that the tokenizer changes"


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt as people read it, as a model is given it, and of a chat its messages as JSON."""

    text: str
    tokens_L: npt.NDArray[np.int32]
    messages: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """A response that a model wrote, and whether it came to its end."""

    text: str
    has_end: bool


@dataclass(frozen=True)
class RowText:
    """The bytes that a row's tokens stand for, which may begin or end within a character, and where each token ends.

    given: how many of them are a prompt, which is tokenised apart. begins and has_end: whether the row's text begins
    its document and ends it; a token that says so stands for no byte. Of a chat messages are its messages as JSON, and
    has_end says whether the last one came to its end.
    """

    data: bytes
    ends_L: npt.NDArray[np.int32]
    given: int
    begins: bool
    has_end: bool
    messages: str | None = None


@dataclass(frozen=True)
class TokenRow:
    """A row of tokens, int32, and which of them are learnt from; the first never is."""

    tokens_L: npt.NDArray[np.int32]
    learnt_L: npt.NDArray[np.bool_]
    text: RowText | None = None

    @property
    def learnt(self) -> int:
        return int(self.learnt_L.sum())


@dataclass(frozen=True)
class Tokenised:
    """A document as rows, of which it has none where nothing of it can be learnt; whether it did not fit into one.

    file and number say where it stands; key is a hash of its text. prompt is there where it is asked and leaves room
    for a response. Of one without rows or prompt, unusable says why.
    """

    file: int
    number: int
    key: int
    rows: tuple[TokenRow, ...]
    is_long: bool
    prompt: TokenPrompt | None = None
    unusable: Reason = NOTHING_LEARNT


@dataclass(frozen=True)
class Rules:
    """How documents become rows: `splits` says what becomes of a text longer than max_length tokens.

    measured: the tokenizer's tokens in bytes, where rows keep their texts.
    """

    tokenizer: Any
    max_length: int
    splits: bool
    learnt_roles: tuple[str, ...] = ("assistant",)
    measured: TokenBytes | None = None
    begin: tuple[int, ...] = field(init=False)
    end: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        for name, token in (("begin", self.tokenizer.bos_token_id), ("end", self.tokenizer.eos_token_id)):
            object.__setattr__(self, name, () if token is None else (int(token),))

    def tokenised(self, documents: Sequence[Document]) -> Iterator[Tokenised]:
        """The rows of every document, in order; documents are of one kind."""
        if documents and documents[0].messages:
            yield from map(self._chat, documents)
            return
        texts = self._ids([document.text or "" for document in documents])
        prompts = self._ids([document.prompt or "" for document in documents])
        for document, prompt, text in zip(documents, prompts, texts, strict=True):
            given = [*self.begin, *prompt]
            asked = self._asked(document.prompt or "", given, None) if document.is_asked else None
            tokens = np.array([*given, *text, *self.end], np.int32)
            if document.text is None:
                yield self._made(document, (), 0, asked)
                continue
            rows = self._of_text(tokens) if document.prompt is None else self._of_prompt(tokens, len(given))
            if self.measured is None:
                yield self._made(document, rows, len(tokens), asked)
                continue
            whole = self._whole_text((document.prompt or "", prompt), (document.text, text), has_end=True)
            kept = _with_texts(rows, whole) if whole else ()
            found = self._made(document, kept, len(tokens), asked)
            yield found if whole else replace(found, unusable=CHANGED)

    def _whole_text(
        self, prompt: tuple[str, list[int]], text: tuple[str, list[int]], *, has_end: bool
    ) -> RowText | None:
        """What all tokens of a document stand for, were they one row; None where the tokenizer changes it."""
        assert self.measured is not None
        before, after = (self.measured.ends(ids, written) for written, ids in (prompt, text))
        if before is None or after is None:
            return None
        given, rest = prompt[0].encode(), text[0].encode()
        end = [len(given) + len(rest)] * len(self.end if has_end else ())
        ends_L = np.concatenate([np.zeros(len(self.begin)), before, len(given) + after, end]).astype(np.int32)
        return RowText(given + rest, ends_L, len(given), True, has_end)

    def answered(self, prompt: TokenPrompt, answers: Sequence[Answer], file: int, number: int) -> Tokenised:
        """A prompt with what a model wrote, a row for each response; an empty one makes none."""
        rows: list[TokenRow] = []
        longest = 0
        written = [answer for answer in answers if answer.text.strip()]
        if prompt.messages is None:
            for answer, ids in zip(written, self._ids([answer.text for answer in written]), strict=True):
                tokens = np.array([*prompt.tokens_L, *ids, *(self.end if answer.has_end else ())], np.int32)
                found = self._of_prompt(tokens, len(prompt.tokens_L))
                if self.measured is not None:
                    given = prompt.tokens_L[len(self.begin) :].tolist()
                    whole = self._whole_text((prompt.text, given), (answer.text, ids), has_end=answer.has_end)
                    found = _with_texts(found, whole) if whole else ()
                longest = max(longest, len(tokens))
                rows += found
        else:
            before = read_messages(prompt.messages) or ()
            for answer in written:
                chat = self.chat((*before, (WRITER, answer.text)), has_end=answer.has_end)
                longest = max(longest, len(chat.tokens_L))
                rows += self._of_chat(chat)
        key = text_key("\n".join([prompt.text, *(answer.text for answer in written)]))
        return Tokenised(file, number, key, tuple(rows), longest > self.max_length)

    def _asked(self, text: str, tokens: list[int], messages: Messages | None) -> TokenPrompt | None:
        """A prompt, where its row has room for a response."""
        if not 0 < len(tokens) < self.max_length:
            return None
        return TokenPrompt(text, np.array(tokens, np.int32), None if messages is None else written_messages(messages))

    def _chat(self, document: Document) -> Tokenised:
        """A chat as one row; without rows where the template refuses it or nothing of it is learnt."""
        asked = None
        if document.is_asked:
            before = asking(document.messages)
            parts = prompt_segments(self.tokenizer, before, self.learnt_roles) or []
            given = [token for ids in self._ids([part.text for part in parts]) for token in ids]
            asked = self._asked("".join(part.text for part in parts), given, before)
        if document.text is None:
            return self._made(document, (), 0, asked)
        chat = self.chat(document.messages)
        found = self._made(document, self._of_chat(chat), len(chat.tokens_L), asked)
        is_changed = self.measured is not None and len(chat.tokens_L) > 0 and chat.text is None
        return replace(found, unusable=CHANGED) if is_changed else found

    def chat(self, messages: Messages, *, has_end: bool = True) -> TokenRow:
        """A chat as one row, however long; without a token where the template refuses it.

        With `measured`, text is None where a message's text is changed.
        """
        parts = segments(self.tokenizer, messages, self.learnt_roles)
        if not parts:
            return TokenRow(np.empty(0, np.int32), np.empty(0, bool))
        if not has_end:
            parts[-1] = _without_end(parts[-1])
        ids = self._ids([part.text for part in parts])
        tokens = np.array([token for part in ids for token in part], np.int32)
        learnt = np.repeat(np.array([part.is_learnt for part in parts], bool), [len(part) for part in ids])
        learnt[:1] = False
        if self.measured is None:
            return TokenRow(tokens, learnt)
        texts = learnt_texts(messages, self.learnt_roles)
        ends_L = chat_ends(parts, ids, texts, self.measured)
        if ends_L is None:
            return TokenRow(tokens, learnt)
        text = RowText(chat_bytes(texts), ends_L, 0, False, has_end, written_messages(messages))
        return TokenRow(tokens, learnt, text)

    def _of_chat(self, chat: TokenRow) -> tuple[TokenRow, ...]:
        rows = self._cut(chat.tokens_L, chat.learnt_L)
        if self.measured is None:
            return rows
        if chat.text is None:
            return ()
        return tuple(
            replace(row, text=replace(chat.text, ends_L=chat.text.ends_L[: len(row.tokens_L)])) for row in rows
        )

    def _of_prompt(self, tokens: npt.NDArray[np.int32], given: int) -> tuple[TokenRow, ...]:
        return self._cut(tokens, np.arange(len(tokens)) >= max(1, given))

    def _made(
        self, document: Document, rows: tuple[TokenRow, ...], tokens: int, asked: TokenPrompt | None = None
    ) -> Tokenised:
        key = text_key(f"{document.prompt or ''}\n{document.text}")
        return Tokenised(document.file, document.number, key, rows, tokens > self.max_length, asked)

    def _cut(self, tokens: npt.NDArray[np.int32], learnt: npt.NDArray[np.bool_]) -> tuple[TokenRow, ...]:
        """The one row of a document that is not split, where anything of it is learnt."""
        row = TokenRow(tokens[: self.max_length], learnt[: self.max_length])
        return (row,) if row.learnt else ()

    def _of_text(self, tokens: npt.NDArray[np.int32]) -> tuple[TokenRow, ...]:
        step = self.max_length - 1
        starts = range(0, len(tokens) - 1, step) if self.splits else range(min(1, len(tokens) - 1))
        parts = [tokens[start : start + self.max_length] for start in starts]
        return tuple(TokenRow(part, np.arange(len(part)) > 0) for part in parts)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return (
            []
            if not texts
            else self.tokenizer(
                texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
            )["input_ids"]
        )


def _with_texts(rows: Iterable[TokenRow], whole: RowText) -> tuple[TokenRow, ...]:
    """The rows of a document, each but the first beginning with the last token of the one before, with their texts."""
    found, place = list[TokenRow](), 0
    for row in rows:
        stop = place + len(row.tokens_L)
        first, last = int(whole.ends_L[place - 1]) if place else 0, int(whole.ends_L[stop - 1])
        text = RowText(
            whole.data[first:last], whole.ends_L[place:stop] - np.int32(first), max(0, whole.given - first),
            begins=place == 0, has_end=whole.has_end and stop == len(whole.ends_L),
        )  # fmt: skip
        found.append(replace(row, text=text))
        place = stop - 1
    return tuple(found)


def _without_end(part: Segment) -> Segment:
    """The last part of a chat up to its message's own end."""
    return part if part.own is None else replace(part, text=part.text[: part.own[1]])


def tokenise_documents(found: Iterable[Document | Dropped], rules: Rules) -> Iterator[Tokenised | Dropped]:
    """Every document as rows, in order; those that nothing can be learnt from are dropped too."""
    held: list[Document | Dropped] = []
    for one in found:
        held.append(one)
        if len(held) == CHUNK_DOCUMENTS:
            yield from _tokenised(held, rules)
            held = []
    yield from _tokenised(held, rules)


def _tokenised(chunk: list[Document | Dropped], rules: Rules) -> Iterator[Tokenised | Dropped]:
    documents = [one for one in chunk if isinstance(one, Document)]
    tokenised = rules.tokenised(documents) if documents else iter(())
    for one in chunk:
        made = one if isinstance(one, Dropped) else next(tokenised)
        if isinstance(made, Dropped) or made.rows or made.prompt is not None:
            yield made
        else:
            is_prompt = isinstance(one, Document) and one.text is None
            yield Dropped(NO_ROOM if is_prompt else made.unusable, made.file, made.number)
