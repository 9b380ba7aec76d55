"""Data shards of a language model: rows of tokens, ready to be read.

Columns: row_id (the row's ordinal over all splits), document (the ordinal of its document in the split: the rows of one
document stand together), tokens (their ids), learnt (one byte for each token: 1 where it is learnt from), and where the
document came from (source_file, source_row). Position t of a row predicts token t + 1, so that a row has as many
positions to learn from as learnt tokens; the first token is never one.

With data.keep_text there are also text (the bytes that the row's tokens stand for; the first and the last character of
a row may be cut), ends (binary, int32: the byte before which each token ends), given (how many of the bytes are a
prompt), begins and has_end (whether the row's text begins its document, and ends it). Of chats the text is that of the
messages that are learnt (data/chat_texts.py), has_end says whether the last one came to its end, and messages (JSON)
are all of them.

Shapes: R rows, L tokens of a row, N positions that are learnt from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.data.shards import RowWriter
from raydistill.data.token_rows import RowText, Tokenised
from raydistill.record.commit import Entry, open_verified
from raydistill.record.store import Store

SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.int64(), nullable=False),
        pa.field("document", pa.int64(), nullable=False),
        pa.field("tokens", pa.large_list(pa.field("token", pa.int32(), nullable=False)), nullable=False),
        pa.field("learnt", pa.large_binary(), nullable=False),
        pa.field("source_file", pa.int32(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
    ]
)
TEXT_FIELDS = [
    pa.field("text", pa.large_binary(), nullable=False),
    pa.field("ends", pa.large_binary(), nullable=False),
    pa.field("given", pa.int32(), nullable=False),
    pa.field("begins", pa.bool_(), nullable=False),
    pa.field("has_end", pa.bool_(), nullable=False),
    pa.field("messages", pa.large_string()),
]
Int64 = npt.NDArray[np.int64]


class TokenShardWriter(RowWriter):
    """Takes the documents of one split in order and commits a shard whenever one is full of rows."""

    def __init__(
        self, store: Store, split: str, *, first_row_id: int, shard_rows: int, fingerprint: str,
        keeps_text: bool = False,
    ) -> None:  # fmt: skip
        schema = pa.schema([*SCHEMA, *TEXT_FIELDS]) if keeps_text else SCHEMA
        super().__init__(
            store, split, first_row_id=first_row_id, shard_rows=shard_rows, fingerprint=fingerprint, schema=schema
        )
        self._documents, self._keeps_text = 0, keeps_text

    def add(self, found: Tokenised) -> None:
        for row in found.rows:
            values = (self._documents, row.tokens_L, row.learnt_L.tobytes(), found.file, found.number)
            if self._keeps_text:
                text = row.text
                assert text is not None, "rows were tokenised without their texts"
                values += (text.data, text.ends_L.tobytes(), text.given, text.begins, text.has_end, text.messages)
            self.add_values(values)
        self._documents += 1


@dataclass(frozen=True)
class TokenShard:
    """The rows of one shard, end to end; borders_R1 are where rows begin, and where the last one ends."""

    name: str
    row_ids_R: Int64
    documents_R: Int64
    borders_R1: Int64
    tokens: npt.NDArray[np.int32]
    learnt: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.row_ids_R)

    @property
    def nbytes(self) -> int:
        arrays = (self.row_ids_R, self.documents_R, self.borders_R1, self.tokens, self.learnt)
        return sum(array.nbytes for array in arrays)

    @property
    def lengths_R(self) -> Int64:
        return np.diff(self.borders_R1)

    @property
    def learnt_R(self) -> Int64:
        """How many tokens of every row are learnt from."""
        return np.diff(np.concatenate([np.zeros(1, np.int64), np.cumsum(self.learnt)])[self.borders_R1])

    def row(self, index: int) -> npt.NDArray[np.int32]:
        return self.tokens[self.borders_R1[index] : self.borders_R1[index + 1]]

    def positions(self, index: int) -> Int64:
        """The positions of a row whose next token is learnt from, rising."""
        learnt_L = self.learnt[self.borders_R1[index] : self.borders_R1[index + 1]]
        return np.flatnonzero(learnt_L[1:])


def read_row_texts(store: Store, entry: Entry) -> list[tuple[RowText, int, int]]:
    """The text of every row, and where the row came from (file, row). Raises UserError as `read_token_shard`."""
    with open_verified(store, "data", entry) as source:
        file = pq.ParquetFile(source)
        names = [*(field.name for field in TEXT_FIELDS), "source_file", "source_row"]
        rows = file.read(columns=[n for n in names if n in file.schema_arrow.names], use_threads=False).to_pylist()
    texts = [
        RowText(
            one["text"], np.frombuffer(one["ends"], np.int32), one["given"], one["begins"], one["has_end"],
            one.get("messages"),
        )
        for one in rows
    ]  # fmt: skip
    return [(text, one["source_file"], one["source_row"]) for text, one in zip(texts, rows, strict=True)]


def read_token_shard(store: Store, entry: Entry, folder: str = "data") -> TokenShard:
    """A committed shard. Raises UserError when the file is not what the manifest says."""
    with open_verified(store, folder, entry) as source:
        table = (
            pq.ParquetFile(source).read(columns=SCHEMA.names[:4], use_threads=False).cast(pa.schema(list(SCHEMA)[:4]))
        )
    tokens, learnt = (table.column(name).combine_chunks() for name in ("tokens", "learnt"))
    tokens, learnt = (a.chunk(0) if isinstance(a, pa.ChunkedArray) else a for a in (tokens, learnt))
    row_ids_R, documents_R = (np.array(table.column(name).to_numpy()) for name in ("row_id", "document"))
    return TokenShard(
        entry.file, row_ids_R, documents_R, tokens.offsets.to_numpy().astype(np.int64),
        tokens.values.to_numpy().astype(np.int32), np.frombuffer(learnt.buffers()[2], np.bool_),
    )  # fmt: skip
