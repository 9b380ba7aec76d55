"""Data shards: a fixed number of rows each, written once in order, read whole.

Columns: row_id (the row's ordinal over all splits, in the order of SPLITS), text, label (class number, -100 without
one; for sets of labels a byte for each of the K classes: 1, 0, or -100 where that is unknown), and where the row came
from (source_file, source_row).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.cache.codecs import from_fixed_binary
from raydistill.data.sources import Row
from raydistill.record.commit import Entry, commit_shard, committed_shard, open_verified, shard_name
from raydistill.record.store import Store, naming

SPLITS = ("train", "validation", "test", "unlabelled", "augmented")
# What a model learns from. Rows without a label have something to say only where there is a teacher.
LABELLED_SPLITS = ("train",)
STUDENT_SPLITS = ("train", "unlabelled", "augmented")
SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.int64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("source_file", pa.int32(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
    ]
)


class RowWriter:
    """Takes the rows of one split in order and commits a shard whenever one is full; keeps those that stand.

    The schema's first column is the row's id, which is counted here; the others are what is added.
    """

    def __init__(
        self, store: Store, split: str, *, first_row_id: int, shard_rows: int, fingerprint: str, schema: pa.Schema,
        folder: str = "data",
    ) -> None:  # fmt: skip
        self._schema, self._folder = schema, folder
        self._store, self._split, self._fingerprint = store, split, fingerprint
        self._next_row_id, self._shard_rows = first_row_id, shard_rows
        self._rows: list[tuple[Any, ...]] = []
        self.entries: list[Entry] = []

    def keep_standing(self) -> int:
        """Takes the shards that stand committed, up to the first that does not, before any row is added; their rows."""
        assert not self._rows
        while entry := committed_shard(self._store, self._next_name(), self._fingerprint):
            self.entries.append(entry)
            self._next_row_id += entry.rows
        return sum(entry.rows for entry in self.entries)

    def add_values(self, values: tuple[Any, ...]) -> None:
        self._rows.append(values)
        if len(self._rows) == self._shard_rows:
            self._commit()

    def close(self) -> list[Entry]:
        """Commits what is left; the split's entries."""
        if self._rows:
            self._commit()
        return self.entries

    def _commit(self) -> None:
        name = self._next_name()
        entry = committed_shard(self._store, name, self._fingerprint)
        self.entries.append(entry or self._write(name))
        self._next_row_id += len(self._rows)
        self._rows = []

    def _next_name(self) -> str:
        return f"{self._folder}/{shard_name(self._split, len(self.entries))}"

    def _write(self, name: str) -> Entry:
        row_ids = np.arange(self._next_row_id, self._next_row_id + len(self._rows))
        columns = [
            pa.array(row_ids),
            *(pa.array(c, f.type) for c, f in zip(zip(*self._rows, strict=True), self._schema.remove(0), strict=True)),
        ]
        staged = self._store.staging(name)
        table = pa.Table.from_arrays(columns, schema=self._schema)
        with naming(staged):
            pq.write_table(table, staged, compression="zstd", write_page_checksum=True, store_schema=False)
        return commit_shard(self._store, staged, name, rows=len(self._rows), fingerprint=self._fingerprint)


class ShardWriter(RowWriter):
    """A RowWriter of texts with labels. classes: how many bytes a row's labels have, where rows have sets of labels."""

    def __init__(
        self,
        store: Store,
        split: str,
        *,
        first_row_id: int,
        shard_rows: int,
        fingerprint: str,
        classes: int | None = None,
    ) -> None:
        label, schema = SCHEMA.get_field_index("label"), SCHEMA
        if classes is not None:
            schema = SCHEMA.set(label, pa.field("label", pa.binary(classes), nullable=False))
        super().__init__(
            store, split, first_row_id=first_row_id, shard_rows=shard_rows, fingerprint=fingerprint, schema=schema
        )

    def add(self, row: Row, label: int | bytes) -> None:
        self.add_values((row.text, label, row.file, row.number))


@dataclass(frozen=True)
class DataShard:
    """The rows of one shard, N of them. labels_N are class numbers, or (N, K) int8 for sets of labels."""

    name: str
    row_ids_N: npt.NDArray[np.int64]
    texts: list[str]
    labels_N: npt.NDArray[np.integer]

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, chosen_N: npt.NDArray[np.bool_]) -> DataShard:
        """The chosen rows, in their order."""
        texts = [text for text, is_chosen in zip(self.texts, chosen_N, strict=True) if is_chosen]
        return DataShard(self.name, self.row_ids_N[chosen_N], texts, self.labels_N[chosen_N])


def read_shard(store: Store, entry: Entry) -> DataShard:
    """A committed data shard. Raises UserError when the file is not what the manifest says."""
    with open_verified(store, "data", entry) as source:
        table = pq.ParquetFile(source).read(columns=["row_id", "text", "label"], use_threads=False)
        row_ids, label = np.array(table.column("row_id").to_numpy()), table.column("label")
        labels = _label_sets(label) if pa.types.is_fixed_size_binary(label.type) else np.array(label.to_numpy())
        return DataShard(entry.file, row_ids, table.column("text").to_pylist(), labels)


def _label_sets(column: pa.ChunkedArray) -> npt.NDArray[np.int8]:
    return np.concatenate([from_fixed_binary(chunk, np.int8) for chunk in column.chunks]).astype(np.int8, copy=False)


def read_split(store: Store, entries: list[Entry]) -> Iterator[DataShard]:
    """The shards of a split, one at a time."""
    for entry in entries:
        yield read_shard(store, entry)
