"""The rows of the data as a student's own tokenizer has them, with the spans that align them with the teacher's tokens.

A shard has the rows of its data shard in the same order, with the columns of one (data/token_shards) of the student's
tokens, and beside them

    teacher_begins, teacher_ends, student_begins, student_ends    binary, int32: of every span which of the row's learnt
                                                                  tokens it has, the teacher's and the student's
    sizes                                                         binary, int32: the span's bytes
    teacher_learnt                                                int32: how many tokens of the row the teacher learns
    cut                                                           int32: tokens beyond the longest row
    changed                                                       bool: the tokenizer or its template changes the text;
                                                                  none is learnt

A row holds the bytes that the teacher's has: where a long document was split for the teacher it is split for the
student. The token that the teacher's rows share is read by the student and not learnt either. A chat is written by the
student's own template.

Shapes: R rows, L tokens of all rows end to end.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.data.chat_texts import learnt_texts, mark_places
from raydistill.data.chats import WRITER, read_messages
from raydistill.data.spans import COLUMNS, Int64, Side, Spans, aligned
from raydistill.data.token_bytes import TokenBytes
from raydistill.data.token_rows import RowText, Rules
from raydistill.data.token_shards import SCHEMA, TokenShard, read_row_texts, read_token_shard
from raydistill.errors import UserError
from raydistill.record.commit import Entry, Manifest, commit_shard, open_verified
from raydistill.record.store import Store, naming

FOLDER = "student_rows"
FACTS = (
    "rows",
    "tokens",
    "learnt",
    "teacher_learnt",
    "spans",
    "in_spans",
    "teacher_in_spans",
    "bytes",
    "cut",
    "changed",
)


@dataclass(frozen=True)
class StudentShard:
    """The student's tokens of a shard's rows, and their spans."""

    tokens: TokenShard
    spans: Spans
    teacher_learnt_R: Int64
    cut_R: Int64
    changed_R: npt.NDArray[np.bool_]

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.spans.nbytes + self.teacher_learnt_R.nbytes

    def in_spans(self, side: str) -> npt.NDArray[np.bool_]:
        """Of every learnt token of a side, teacher or student, row after row, whether it is in a span."""
        learnt_R = self.teacher_learnt_R if side == "teacher" else self.tokens.learnt_R
        before_R, rows_J = (
            np.cumsum(learnt_R) - learnt_R,
            np.repeat(np.arange(len(self.tokens)), np.diff(self.spans.borders_R1)),
        )
        changes = np.zeros(int(learnt_R.sum()) + 1, np.int64)
        np.add.at(changes, before_R[rows_J] + getattr(self.spans, f"{side}_begins"), 1)
        np.add.at(changes, before_R[rows_J] + getattr(self.spans, f"{side}_ends"), -1)
        return np.cumsum(changes)[:-1] > 0

    @property
    def bytes_R(self) -> Int64:
        """Of every row the bytes that are in spans."""
        return np.diff(np.concatenate([np.zeros(1, np.int64), np.cumsum(self.spans.sizes)])[self.spans.borders_R1])

    def counts(self) -> Counter[str]:
        """FACTS of the shard: tokens of the student, bytes within spans, tokens of either side within them."""
        spans = self.spans
        return Counter(
            rows=len(self.tokens), tokens=len(self.tokens.tokens), learnt=int(self.tokens.learnt.sum()),
            teacher_learnt=int(self.teacher_learnt_R.sum()), spans=len(spans), bytes=int(spans.sizes.sum()),
            in_spans=int((spans.student_ends - spans.student_begins).sum()),
            teacher_in_spans=int((spans.teacher_ends - spans.teacher_begins).sum()),
            cut=int(self.cut_R.sum()), changed=int(self.changed_R.sum()),
        )  # fmt: skip


@dataclass(frozen=True)
class _Row:
    """A row's text in the student's tokens."""

    tokens: list[int]
    ends: npt.NDArray[np.integer]
    begins: bool
    has_end: bool
    cut: int = 0
    changed: bool = False
    learnt: npt.NDArray[np.bool_] | None = None  # of a chat


class StudentRows:
    """Makes a student's rows of the teacher's."""

    def __init__(
        self, tokenizer: Any, setting: str, teacher: Any, max_length: int, learnt_roles: tuple[str, ...] = (WRITER,)
    ) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._measured, self._teachers_unknown = TokenBytes(tokenizer, setting), teacher.unk_token_id
        self._chats = Rules(tokenizer, max_length, splits=False, learnt_roles=learnt_roles, measured=self._measured)
        self._begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        self._end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self._teacher_has_begin = teacher.bos_token_id is not None
        self._teacher_has_end = teacher.eos_token_id is not None

    def made(self, shard: TokenShard, texts: list[RowText]) -> StudentShard:
        """The rows of a data shard, whose texts are given."""
        parts = [part for text in texts if text.messages is None for part in _parts(text)]
        found = iter(zip(parts, self._ids(parts) if parts else (), strict=True))
        rows = [
            self._chat(text, text.messages) if text.messages is not None else self._row(text, next(found), next(found))
            for text in texts
        ]
        teacher = self._teachers(shard, texts)
        borders_R1 = np.cumsum([0, *(len(row.tokens) for row in rows)])
        ids = np.array([token for row in rows for token in row.tokens], np.int32)
        ends_L = np.concatenate([row.ends for row in rows]).astype(np.int64)
        side = Side(
            borders_R1, ends_L, self._learnt(borders_R1, ends_L, rows, texts, teacher),
            _is(ids, self._measured.unknown), np.array([row.begins for row in rows]),
            np.array([row.has_end for row in rows]),
        )  # fmt: skip
        marks = [self._marks(text) for text in texts]
        spans = aligned(teacher, side, np.array([len(text.data) for text in texts]), marks)
        tokens = TokenShard(shard.name, shard.row_ids_R, shard.documents_R, borders_R1, ids, side.learnt_L)
        cut_R, changed_R = np.array([row.cut for row in rows]), np.array([row.changed for row in rows])
        return StudentShard(tokens, spans, shard.learnt_R, cut_R, changed_R)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        found = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        )
        return found["input_ids"]

    def _row(self, text: RowText, given: tuple[str, list[int]], rest: tuple[str, list[int]]) -> _Row:
        measured = [self._measured.ends(ids, part) for part, ids in (given, rest)]
        before, after = measured
        begin, end = self._begin if text.begins else [], self._end if text.has_end else []
        tokens = [*begin, *given[1], *rest[1], *end]
        if before is None or after is None or not tokens:
            tokens = tokens[: self._max_length] or self._begin or self._end or [0]
            changed = before is None or after is None
            return _Row(tokens, np.zeros(len(tokens), np.int64), False, False, changed=changed)
        # Of a row that begins or ends within a character the bytes of that are no token's.
        first = _bytes_before(text.data)
        at = first + len(given[0].encode())
        ends = np.concatenate([np.full(len(begin), 0), first + before, at + after, [len(text.data)] * len(end)])
        kept = min(len(tokens), self._max_length)
        has_end = bool(end) and kept == len(tokens)
        return _Row(tokens[:kept], ends[:kept], bool(begin), has_end, cut=len(tokens) - kept)

    def _chat(self, text: RowText, messages: str) -> _Row:
        """A chat by the student's template."""
        found = self._chats.chat(read_messages(messages) or (), has_end=text.has_end)
        kept = min(len(found.tokens_L), self._max_length)
        tokens = found.tokens_L[:kept].tolist()
        if found.text is None:
            tokens = tokens or self._begin or self._end or [0]
            return _Row(tokens, np.zeros(len(tokens), np.int64), False, False, changed=True)
        return _Row(
            tokens, found.text.ends_L[:kept], False, False, cut=len(found.tokens_L) - kept, learnt=found.learnt_L[:kept]
        )

    def _marks(self, text: RowText) -> list[int]:
        """The bytes of a row that stand for no text."""
        if text.messages is None:
            return []
        return mark_places(learnt_texts(read_messages(text.messages) or (), self._chats.learnt_roles))

    def _teachers(self, shard: TokenShard, texts: list[RowText]) -> Side:
        begins_R = np.array([text.begins and self._teacher_has_begin for text in texts])
        ends_L = np.concatenate([text.ends_L for text in texts]).astype(np.int64)
        return Side(
            shard.borders_R1, ends_L, shard.learnt, _is(shard.tokens, self._teachers_unknown), begins_R,
            np.array([text.has_end and self._teacher_has_end and text.messages is None for text in texts]),
        )  # fmt: skip

    @staticmethod
    def _learnt(
        borders_R1: Int64, ends_L: Int64, rows: list[_Row], texts: list[RowText], teacher: Side
    ) -> npt.NDArray[np.bool_]:
        """A row's first token is not learnt, nor what begins before the teacher's own learnt text does."""
        firsts = teacher.ends_L[teacher.borders_R1[:-1]]
        from_R = np.array([text.given if text.begins else first for text, first in zip(texts, firsts, strict=True)])
        rows_L = np.repeat(np.arange(len(rows)), np.diff(borders_R1))
        starts_L = np.concatenate([[0], ends_L[:-1]])
        starts_L[borders_R1[:-1]] = 0
        learnt_L = (starts_L >= from_R[rows_L]) & ~np.array([row.changed for row in rows])[rows_L]
        learnt_L[borders_R1[:-1]] = False
        for row, begin in zip(rows, borders_R1, strict=False):
            if row.learnt is not None:
                learnt_L[begin : begin + len(row.tokens)] = row.learnt
        return learnt_L


def _is(tokens_L: npt.NDArray[np.int32], token: int | None) -> npt.NDArray[np.bool_]:
    return np.zeros(len(tokens_L), bool) if token is None else tokens_L == token


def _bytes_before(data: bytes) -> int:
    """How many bytes at the begin of a row are the rest of a character."""
    return next((place for place, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)


def _parts(text: RowText) -> tuple[str, str]:
    """The prompt and the rest of a row, as far as their characters are whole."""
    data = text.data[_bytes_before(text.data) :]
    return data[: text.given].decode(errors="ignore"), data[text.given :].decode(errors="ignore")


SPAN_FIELDS = [
    *(pa.field(name, pa.large_binary(), nullable=False) for name in COLUMNS),
    pa.field("teacher_learnt", pa.int32(), nullable=False),
    pa.field("cut", pa.int32(), nullable=False),
    pa.field("changed", pa.bool_(), nullable=False),
]


def write_student_shard(store: Store, shard: StudentShard, sources: list[tuple[int, int]], fingerprint: str) -> Entry:
    """Commits the rows of a data shard, which came from those places (file, row)."""
    tokens, spans = shard.tokens, shard.spans
    borders = tokens.borders_R1
    of_spans = [
        [getattr(spans, name)[a:b].astype("<i4").tobytes() for a, b in pairwise(spans.borders_R1)] for name in COLUMNS
    ]
    learnt = [tokens.learnt[a:b].tobytes() for a, b in pairwise(borders)]
    values = [
        tokens.row_ids_R, tokens.documents_R, _list(borders, tokens.tokens), learnt,
        *zip(*sources, strict=True), *of_spans, shard.teacher_learnt_R, shard.cut_R, shard.changed_R,
    ]  # fmt: skip
    schema = pa.schema([*SCHEMA, *SPAN_FIELDS])
    arrays = [
        value if isinstance(value, pa.Array) else pa.array(value, field.type)
        for value, field in zip(values, schema, strict=True)
    ]
    name = f"{FOLDER}/{tokens.name}"
    staged = store.staging(name)
    with naming(staged):
        table = pa.Table.from_arrays(arrays, schema=schema)
        pq.write_table(table, staged, compression="zstd", write_page_checksum=True, store_schema=False)
    return commit_shard(store, staged, name, rows=len(tokens), fingerprint=fingerprint)


def _list(borders_R1: Int64, tokens: npt.NDArray[np.int32]) -> pa.Array:
    """A list of tokens a row."""
    return pa.LargeListArray.from_arrays(pa.array(borders_R1), pa.array(tokens), type=SCHEMA.field("tokens").type)


def read_student_shard(store: Store, entry: Entry) -> StudentShard:
    """A committed shard. Raises UserError when the file is not what the manifest says."""
    tokens = read_token_shard(store, entry, FOLDER)
    with open_verified(store, FOLDER, entry) as source:
        table = pq.ParquetFile(source).read(columns=[field.name for field in SPAN_FIELDS], use_threads=False)
    flat = {name: table.column(name).to_pylist() for name in COLUMNS}
    borders_R1 = np.cumsum([0, *(len(value) // 4 for value in flat["sizes"])])
    spans = Spans(borders_R1, *(np.frombuffer(b"".join(flat[name]), "<i4").astype(np.int64) for name in COLUMNS))
    learnt_R, cut_R = (table.column(name).to_numpy().astype(np.int64) for name in ("teacher_learnt", "cut"))
    return StudentShard(tokens, spans, learnt_R, cut_R, table.column("changed").to_numpy())


def check_texts(data: Manifest, where: str) -> None:
    """Raises UserError for data that do not hold their rows' texts."""
    if not data.facts.get("keeps_text"):
        raise UserError(
            f"{where}: keeps no texts, which train.loss.cross_tokenizer aligns tokens by. Set data.keep_text=true"
            " there, and do it again with --redo prepare"
        )


def teachers_rows(store: Store, entry: Entry) -> tuple[TokenShard, list[RowText], list[tuple[int, int]]]:
    """A data shard with the texts of its rows, and where they came from."""
    found = read_row_texts(store, entry)
    return read_token_shard(store, entry), [text for text, _, _ in found], [(file, row) for _, file, row in found]
