"""A shard of the teacher's features: ragged rows in one Parquet file, written as a stream and mapped when it is read.

Columns: row_id, tokens (the row's real tokens), and one binary column for each feature, which holds the numbers of the
real tokens in C order and 16 bits each; padding is never stored. Rows stand in the order in which they were scored, by
length, so that a shard of any size is written with one row group in memory; they are joined by row id.

A feature is read where it lies in the file: every column of a row group is one uncompressed page of plain values, each
of them after its length in four bytes, so that the place of a value follows from the lengths. The file is mapped and
not read, so that what training holds of it is the system's page cache, which the system takes back.

Shapes: N rows, L tokens, W width, A attention heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raydistill.errors import UserError
from raydistill.losses.cached_features import Axes
from raydistill.record.commit import Entry, Manifest, commit_shard, map_verified
from raydistill.record.store import Store, naming

# Two bytes a number: float16 has 11 bits and ends at 65504, bfloat16 has 8 bits and float32's range.
FEATURE_CODECS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
NUMBER_BYTES = 2
LENGTH_BYTES = 4  # before every value of a plain binary column
GROUP_BYTES = 64 << 20
GROUP_ROWS = 16_384  # below the number of rows at which Arrow ends a page
PAGE_BYTES = 1 << 30  # and a value, so that a page of one row fits the format's 2 GiB
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FeatureColumn:
    """One feature of a cache: the axes of a row, and the size of the one that is not tokens (W or A)."""

    name: str
    axes: Axes
    size: int

    def shape(self, tokens: int) -> tuple[int, ...]:
        """Of a row with so many tokens."""
        return tuple(self.size if axis in "WA" else tokens for axis in self.axes)

    def row_bytes(self, tokens_N: Int64) -> Int64:
        """Bytes of each row."""
        return np.int64(NUMBER_BYTES * self.size) * tokens_N ** self.axes.count("L")


class FeatureWriter:
    """Takes padded batches of rows and commits them as one shard; with an error inside, what was written goes."""

    def __init__(self, store: Store, name: str, columns: Sequence[FeatureColumn], codec: str) -> None:
        self._store, self._name, self._columns, self._dtype = store, name, tuple(columns), FEATURE_CODECS[codec]
        self._staged = store.staging(name)
        self._row_ids: list[Int64] = []
        self._tokens: list[Int64] = []
        self._values: dict[str, list[npt.NDArray[np.uint8]]] = {column.name: [] for column in columns}
        self._pending = self._rows = 0
        self._schema = pa.schema(
            [
                pa.field("row_id", pa.int64(), nullable=False),
                pa.field("tokens", pa.int32(), nullable=False),
                *(pa.field(column.name, pa.large_binary(), nullable=False) for column in columns),
            ]
        )
        numbers = {"row_id": "DELTA_BINARY_PACKED", "tokens": "DELTA_BINARY_PACKED"}
        with naming(self._staged):
            self._file = pq.ParquetWriter(
                self._staged, self._schema, compression="NONE", use_dictionary=False, write_statistics=False,
                column_encoding=numbers | {column.name: "PLAIN" for column in columns}, data_page_version="1.0",
                data_page_size=PAGE_BYTES, write_page_checksum=True, store_schema=False,
            )  # fmt: skip

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is not None:
            self._file.close()
            self._staged.unlink(missing_ok=True)

    def add(self, row_ids_N: Int64, tokens_N: Int64, batch: Mapping[str, torch.Tensor]) -> None:
        """Rows padded on the right: N, and then the column's axes.

        Raises ValueError, naming the row, for a number that is not finite or does not fit the codec.
        """
        self._row_ids.append(row_ids_N)
        self._tokens.append(tokens_N)
        for column in self._columns:
            values = self._real(column, batch[column.name], tokens_N).to(self._dtype)
            if not torch.isfinite(values).all():
                raise ValueError(_not_finite(column, batch[column.name], row_ids_N, tokens_N, self._dtype))
            raw = values.cpu().view(torch.uint8).numpy()
            assert raw.nbytes == column.row_bytes(tokens_N).sum(), f"{column.name} has another size than {column.size}"
            self._values[column.name].append(raw)
            self._pending += raw.nbytes
        while self._pending > GROUP_BYTES or sum(map(len, self._tokens)) > GROUP_ROWS:
            self._write_group()

    @staticmethod
    def _real(column: FeatureColumn, padded: torch.Tensor, tokens_N: Int64) -> torch.Tensor:
        """The numbers of the real tokens, row after row, one-dimensional."""
        if "L" not in column.axes:
            return padded.reshape(-1)
        longest = padded.shape[1 + column.axes.index("L")]
        real_NL = torch.arange(longest, device=padded.device) < torch.from_numpy(tokens_N)[:, None].to(padded.device)
        if column.axes == "LW":
            return padded[real_NL].reshape(-1)
        return padded[(real_NL[:, None, :, None] & real_NL[:, None, None, :]).expand(padded.shape)]

    def _write_group(self) -> None:
        """One row group: as many rows as fit, at least one. Where it ends follows from the rows, not the batches."""
        row_ids_N, tokens_N = np.concatenate(self._row_ids), np.concatenate(self._tokens)
        sizes = {column.name: column.row_bytes(tokens_N) for column in self._columns}
        totals = np.cumsum(np.sum(list(sizes.values()), axis=0))
        rows = min(max(1, int(np.searchsorted(totals, GROUP_BYTES, side="right"))), GROUP_ROWS)
        arrays: list[Any] = [pa.array(row_ids_N[:rows]), pa.array(tokens_N[:rows], pa.int32())]
        for column in self._columns:
            borders = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[column.name][:rows])])
            raw = np.concatenate(self._values[column.name])
            if borders[-1] > PAGE_BYTES:
                raise ValueError(f"row {row_ids_N[0]}: {column.name} takes {borders[-1]} bytes; leave that feature out")
            buffers = [None, pa.py_buffer(borders), pa.py_buffer(raw[: borders[-1]])]
            arrays.append(pa.LargeBinaryArray.from_buffers(pa.large_binary(), rows, buffers))
            self._values[column.name] = [raw[borders[-1] :].copy()]
        with naming(self._staged):
            self._file.write_table(pa.Table.from_arrays(arrays, schema=self._schema), row_group_size=rows)
        self._row_ids, self._tokens = [row_ids_N[rows:]], [tokens_N[rows:]]
        self._pending -= int(totals[rows - 1])
        self._rows += rows

    def commit(self, fingerprint: str) -> Entry:
        """Verifies, publishes and commits the shard; its entry."""
        while sum(map(len, self._tokens)):
            self._write_group()
        with naming(self._staged):
            self._file.close()
        return commit_shard(self._store, self._staged, self._name, rows=self._rows, fingerprint=fingerprint)


def _not_finite(
    column: FeatureColumn, padded: torch.Tensor, row_ids_N: Int64, tokens_N: Int64, dtype: torch.dtype
) -> str:
    """What is wrong with the first row that is not finite in this dtype."""
    for row_id, tokens, row in zip(row_ids_N, tokens_N, padded, strict=True):
        real = row[tuple(slice(length) for length in column.shape(int(tokens)))]
        if not torch.isfinite(real).all():
            return (
                f"row {row_id}: {column.name} is not finite. Check the teacher's weights, or use teacher.dtype=float32"
            )
        if not torch.isfinite(real.to(dtype)).all():
            largest = real.abs().max().item()
            remedy = "which does not fit. Use teacher.features_codec=bfloat16"
            return f"row {row_id}: {column.name} has {largest:.4g}, {remedy}"
    raise AssertionError("every row is finite")


@dataclass(frozen=True)
class FeatureShard:
    """A mapped shard: where each row's numbers begin in the file, in the order of the data shard's rows."""

    columns: dict[str, FeatureColumn]
    dtype: torch.dtype
    file: npt.NDArray[np.uint8]
    tokens_N: Int64
    starts: dict[str, Int64]

    @property
    def nbytes(self) -> int:
        """Held in memory; the file is mapped."""
        return self.tokens_N.nbytes + sum(starts.nbytes for starts in self.starts.values())

    def where(self, chosen_N: npt.NDArray[np.bool_]) -> FeatureShard:
        """The chosen rows, in their order."""
        starts = {name: starts_N[chosen_N] for name, starts_N in self.starts.items()}
        return replace(self, tokens_N=self.tokens_N[chosen_N], starts=starts)

    def row(self, name: str, index: int) -> npt.NDArray[np.int16]:
        """A row's numbers, as the bits of `dtype`, without a copy."""
        column, tokens, start = self.columns[name], int(self.tokens_N[index]), int(self.starts[name][index])
        shape = column.shape(tokens)
        return self.file[start : start + NUMBER_BYTES * int(np.prod(shape))].view(np.int16).reshape(shape)


def read_features(
    store: Store, folder: str, entry: Entry, manifest: Manifest, *, row_ids_N: Int64, tokens_N: Int64, names: set[str]
) -> FeatureShard:
    """These features of the rows of a data shard, whose ids and counts of tokens are given.

    Raises UserError when the file is not what the manifest says, has other rows, or their tokens are not as many.
    """
    where, buffer = store.where(f"{folder}/{entry.file}"), map_verified(store, folder, entry)
    file = pq.ParquetFile(pa.BufferReader(buffer))
    index = file.read(columns=["row_id", "tokens"], use_threads=False)
    kept_ids_N, kept_tokens_N = (index.column(name).to_numpy().astype(np.int64) for name in ("row_id", "tokens"))
    place_N = _places(kept_ids_N, row_ids_N)
    if place_N is None:
        raise UserError(f"{where}: holds other rows than its data shard. Score again with --redo teach")
    other = kept_tokens_N[place_N] != tokens_N
    if other.any():
        row = int(np.flatnonzero(other)[0])
        raise UserError(
            f"{where}: has {kept_tokens_N[place_N][row]} tokens for row {row_ids_N[row]}, the student's tokenizer gives"
            f" {tokens_N[row]}. Use a student with the teacher's tokenizer, or train.loss.features_from=teacher"
        )
    columns = {c["name"]: FeatureColumn(c["name"], c["axes"], c["size"]) for c in manifest.facts["features"]}
    data = np.frombuffer(buffer, np.uint8)
    starts = {name: _starts(file.metadata, data, columns[name], kept_tokens_N, where) for name in names}
    return FeatureShard(
        columns, FEATURE_CODECS[manifest.facts["codec"]], data, tokens_N, {n: s[place_N] for n, s in starts.items()}
    )


def _places(kept_ids_N: Int64, row_ids_N: Int64) -> Int64 | None:
    """Where each row stands among those kept; None when they are not the same rows."""
    order, wanted = np.argsort(kept_ids_N, kind="stable"), np.argsort(row_ids_N, kind="stable")
    if not np.array_equal(kept_ids_N[order], row_ids_N[wanted]):
        return None
    place_N = np.empty_like(order)
    place_N[wanted] = order
    return place_N


def _starts(metadata: Any, data: npt.NDArray[np.uint8], column: FeatureColumn, tokens_N: Int64, where: str) -> Int64:
    """Where each value of a column begins in the file, checked against the lengths that stand before the values."""
    sizes_N, starts_N = column.row_bytes(tokens_N), np.empty(len(tokens_N), np.int64)
    number = metadata.schema.names.index(column.name)
    first = 0
    for group in range(metadata.num_row_groups):
        chunk = metadata.row_group(group).column(number)
        rows = slice(first, first + chunk.num_values)
        lengths = sizes_N[rows] + LENGTH_BYTES
        end = chunk.data_page_offset + chunk.total_compressed_size
        starts_N[rows] = end - np.cumsum(lengths[::-1])[::-1] + LENGTH_BYTES
        first = rows.stop
    found_N = data[starts_N[:, None] + np.arange(-LENGTH_BYTES, 0)].view("<u4")[:, 0]
    if not np.array_equal(found_N, sizes_N):
        raise UserError(
            f"{where}: {column.name}: is not laid out as this version writes it. Score again with --redo teach"
        )
    return starts_N
