"""The user's documents for a language model: texts, prompts with responses, chats, and the rows of tokens they become.

A text is learnt from as a whole: every token but its first is predicted. Of a prompt with its response the response is.
Where the tokenizer has them, a token that begins a document and one that ends it stand around both; the end is
learnt. Prompt and response are tokenised apart and put together as they are, so that where the response begins does
not depend on what stands there. Of a chat, written by the tokenizer's template alone, the messages of some roles are
learnt (`data/chats.py`).

A text longer than a row is split into rows that share one token: the last of one is the first of the next, which is
read and not learnt, so that every token of a text but its first is predicted once. With `cut`, and for a response that
is too long, what does not fit is left out. A document without a token to learn from makes no row.

Shapes: L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydistill.data.chats import Messages, read_messages, segments
from raydistill.data.duplicates import text_key
from raydistill.data.sources import Dropped, Fields, Reason, Source, read_values
from raydistill.data.spool import Spool

CHUNK_DOCUMENTS = 256
NOTHING_LEARNT: Reason = "no token to learn from"


@dataclass(frozen=True, slots=True)
class Document:
    """A text (prompt is None), a prompt with its response, or a chat, and where it stands."""

    prompt: str | None
    text: str
    file: int
    number: int
    messages: Messages = ()


@dataclass(frozen=True)
class TokenRow:
    """A row of tokens, int32, and which of them are learnt from; the first never is."""

    tokens_L: npt.NDArray[np.int32]
    learnt_L: npt.NDArray[np.bool_]

    @property
    def learnt(self) -> int:
        return int(self.learnt_L.sum())


@dataclass(frozen=True)
class Tokenised:
    """A document as rows, of which it has none where nothing of it can be learnt; whether it did not fit into one.

    file and number say where it stands; key is a hash of its text.
    """

    file: int
    number: int
    key: int
    rows: tuple[TokenRow, ...]
    is_long: bool


@dataclass(frozen=True)
class Rules:
    """How documents become rows: `splits` says what becomes of a text longer than max_length tokens."""

    tokenizer: Any
    max_length: int
    splits: bool
    learnt_roles: tuple[str, ...] = ("assistant",)
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
        texts = self._ids([document.text for document in documents])
        prompts = self._ids([document.prompt or "" for document in documents])
        for document, prompt, text in zip(documents, prompts, texts, strict=True):
            tokens = np.array([*self.begin, *prompt, *text, *self.end], np.int32)
            if document.prompt is None:
                yield self._made(document, tuple(self._of_text(tokens)), len(tokens))
            else:
                learnt = np.arange(len(tokens)) >= max(1, len(self.begin) + len(prompt))
                yield self._made(document, self._cut(tokens, learnt), len(tokens))

    def _chat(self, document: Document) -> Tokenised:
        """A chat as one row; without rows where the template refuses it or nothing of it is learnt."""
        parts = segments(self.tokenizer, document.messages, self.learnt_roles)
        if parts is None:
            return self._made(document, (), 0)
        ids = self._ids([part.text for part in parts])
        tokens = np.array([token for part in ids for token in part], np.int32)
        learnt = np.repeat(np.array([part.is_learnt for part in parts], bool), [len(part) for part in ids])
        learnt[:1] = False
        return self._made(document, self._cut(tokens, learnt), len(tokens))

    def _made(self, document: Document, rows: tuple[TokenRow, ...], tokens: int) -> Tokenised:
        key = text_key(f"{document.prompt or ''}\n{document.text}")
        return Tokenised(document.file, document.number, key, rows, tokens > self.max_length)

    def _cut(self, tokens: npt.NDArray[np.int32], learnt: npt.NDArray[np.bool_]) -> tuple[TokenRow, ...]:
        """The one row of a document that is not split, where anything of it is learnt."""
        row = TokenRow(tokens[: self.max_length], learnt[: self.max_length])
        return (row,) if row.learnt else ()

    def _of_text(self, tokens: npt.NDArray[np.int32]) -> Iterator[TokenRow]:
        step = self.max_length - 1
        starts = range(0, len(tokens) - 1, step) if self.splits else range(min(1, len(tokens) - 1))
        for start in starts:
            part = tokens[start : start + self.max_length]
            yield TokenRow(part, np.arange(len(part)) > 0)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]


def read_documents(source: Source, fields: Fields) -> Iterator[Document | Dropped]:
    """Every row of the source in order; `fields` names a column of texts or chats, or one of prompts and responses."""
    for file, number, values in read_values(source, fields):
        if values is None:
            yield Dropped("malformed", file, number)
        elif not fields.texts:
            yield _read_chat(values[0], file, number, fields.max_row_bytes)
        elif reason := _problem(values, fields.max_row_bytes):
            yield Dropped(reason, file, number)
        else:
            *prompt, text = values
            yield Document(prompt[0] if prompt else None, text, file, number)


def _read_chat(value: Any, file: int, number: int, max_bytes: int) -> Document | Dropped:
    if (messages := read_messages(value)) is None:
        return Dropped("messages are malformed", file, number)
    text = "\n".join(content for _, content in messages)
    reason = _problem((text,), max_bytes)
    return Dropped(reason, file, number) if reason else Document(None, text, file, number, messages)


def _problem(values: tuple[Any, ...], max_bytes: int) -> Reason | None:
    """What is wrong with a row."""
    if any(value is None for value in values):
        return "null text"
    if not all(isinstance(value, str) for value in values):
        return "text is not text"
    if not values[-1].strip():
        return "empty text"
    try:
        return "over max_row_bytes" if sum(len(value.encode()) for value in values) > max_bytes else None
    except UnicodeEncodeError:
        return "text is not text"


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
        if isinstance(made, Tokenised) and not made.rows:
            yield Dropped(NOTHING_LEARNT, made.file, made.number)
        else:
            yield made


class TokenSpool:
    """Tokenised documents between two passes, so that no text is tokenised twice."""

    _SCHEMA = pa.schema(
        [
            ("file", pa.int32()), ("number", pa.int64()), ("key", pa.uint64()), ("is_long", pa.bool_()),
            ("lengths", pa.list_(pa.int32())), ("tokens", pa.large_binary()), ("learnt", pa.large_binary()),
        ]
    )  # fmt: skip

    def __init__(self) -> None:
        self._spool = Spool(self._SCHEMA)
        self.close = self._spool.close

    def add(self, found: Tokenised) -> None:
        lengths = [len(row.tokens_L) for row in found.rows]
        tokens = b"".join(row.tokens_L.tobytes() for row in found.rows)
        learnt = b"".join(row.learnt_L.tobytes() for row in found.rows)
        self._spool.add((found.file, found.number, found.key, found.is_long, lengths, tokens, learnt))

    def __iter__(self) -> Iterator[Tokenised]:
        for one in self._spool:
            borders = np.cumsum(one["lengths"])[:-1]
            tokens = np.split(np.frombuffer(one["tokens"], np.int32), borders)
            learnt = np.split(np.frombuffer(one["learnt"], np.bool_), borders)
            rows = tuple(TokenRow(t, w) for t, w in zip(tokens, learnt, strict=True))
            yield Tokenised(one["file"], one["number"], one["key"], rows, one["is_long"])
