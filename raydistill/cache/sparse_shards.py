"""A shard of sparse next-token targets: one row is one text, with as many positions as it has tokens.

Columns, readable with any Parquet reader; a binary value holds numbers of its row, position after position:

    row_id      int64
    tokens      int32   positions of the row
    kept        binary  of each position one byte: how many tokens are kept there
    gap_00 …    binary  of each position with a kept token that so many others follow, one byte: the class of its gap,
                        and 128 more where it has a count. A position's kept tokens stand by rising rank in the cache's
                        alphabet; a gap is the rank less the one before. gap_00 has the last token of every position
    weights     binary  of each kept token with a count one byte: the count's class. Others are drawn from the tail
    bits        binary  of each kept token what the classes of its gap and its count leave, packed (gap_coding)
    logprobs    binary  of each kept token its log-probability, float16 (topk, and sampled with probabilities)
    log_tail    binary  of each position the logarithm of the mass that is not kept, float32 (topk)
    entropy     binary  of each position one byte, in sixteenths of a nat

A gap of each place has a column of its own because each has its own distribution: zstd then codes the classes of a
page with one table. Counted from the end they are more alike than from the front, since positions differ in how many
they keep; and a code of whole bits has no short word for "no count", which therefore goes with the class. Nothing of
a gap is lost. What rounding does to the rest:

- A count is a whole number of 1/units. Head tokens have their own, the tail has one for all, which its drawn tokens
  share. Counts are rounded together by a systematic sample of the units (Madow 1949): laid end to end, each stretch
  gets the integers that it covers after a shift by one uniform. So each is off by less than one unit, is right in the
  mean over seeds, and a position's counts sum to `units` exactly. What gets 0 units is not stored. The shift is drawn
  apart from the tail's, so that means multiply: weights stay unbiased. For `random`, counts are draws and exact.
- A log-probability is off by 2^-11 of itself at most; topk's weights and tail are divided by their sum when read.
- An entropy is off by less than 1/16 nat, and right in the mean.

Shapes: R rows, N positions, K kept tokens, M kept tokens of all positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raydistill.cache.alphabet import Alphabet
from raydistill.cache.gap_coding import Int64
from raydistill.cache.sparse_rows import SparseFormat, decode, encode
from raydistill.errors import UserError
from raydistill.record.commit import Entry, commit_shard, open_verified
from raydistill.record.store import Store, naming
from raydistill.targets import SparseTargets

GROUP_POSITIONS = 1 << 18
PAGE_BYTES = 1 << 23
REMEDY = "Score again with --redo teach"
COMPRESSED = ("kept", "gap_", "weights", "entropy", "row_id", "tokens")
DTYPES = {"bits": "<u4", "logprobs": "<f2", "log_tail": "<f4"}  # the others are bytes


def write_sparse(
    store: Store, name: str, row_ids_R: Int64, tokens_R: Int64, targets: SparseTargets, *,
    form: SparseFormat, alphabet: Alphabet, fingerprint: str,
) -> Entry:  # fmt: skip
    """Commits a shard. The targets are those of all rows' positions, one row after the other, row ids as given.

    Raises ValueError where an id is not in the alphabet or a weight or an entropy is not finite.
    """
    assert len(targets.ids_NK) == tokens_R.sum(), "as many targets as positions"
    _check(targets, alphabet)
    schema = _schema(form)
    staged, borders_R1 = store.staging(name), np.concatenate([np.zeros(1, np.int64), np.cumsum(tokens_R)])
    numbers = {"row_id": "DELTA_BINARY_PACKED", "tokens": "DELTA_BINARY_PACKED"}
    compression: Any = {c: "ZSTD" if c.startswith(COMPRESSED) else "NONE" for c in schema.names}
    with naming(staged), pq.ParquetWriter(
        staged, schema, use_dictionary=False, write_statistics=False, data_page_size=PAGE_BYTES,
        compression=compression,
        column_encoding=numbers | dict.fromkeys(form.columns, "DELTA_LENGTH_BYTE_ARRAY"),
        write_page_checksum=True, store_schema=False,
    ) as file:  # fmt: skip
        for rows in _groups(tokens_R):
            cut = slice(int(borders_R1[rows.start]), int(borders_R1[rows.stop]))
            values = encode(
                row_ids_R[rows], tokens_R[rows], targets.select(torch.arange(cut.start, cut.stop)), form, alphabet
            )
            arrays = [pa.array(row_ids_R[rows]), pa.array(tokens_R[rows], pa.int32())]
            arrays += [_binary(*values[column]) for column in form.columns]
            file.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=len(tokens_R[rows]))
    return commit_shard(store, staged, name, rows=len(row_ids_R), fingerprint=fingerprint)


def _schema(form: SparseFormat) -> pa.Schema:
    columns = {"row_id": pa.int64(), "tokens": pa.int32()} | dict.fromkeys(form.columns, pa.large_binary())
    return pa.schema([pa.field(column, kind, nullable=False) for column, kind in columns.items()])


def _groups(tokens_R: Int64) -> list[slice]:
    """Rows that make a row group of about GROUP_POSITIONS; they follow from the rows alone."""
    group_R = np.cumsum(tokens_R) // GROUP_POSITIONS
    starts = np.flatnonzero(np.diff(group_R, prepend=-1)).tolist()
    return [slice(start, stop) for start, stop in pairwise([*starts, len(tokens_R)])]


def _check(targets: SparseTargets, alphabet: Alphabet) -> None:
    if len(targets.ids_NK) and int(targets.ids_NK.max()) >= alphabet.size:
        raise ValueError(f"token id {int(targets.ids_NK.max())} is not in a vocabulary of {alphabet.size}")
    numbers = {"a weight": targets.weights_NK, "an entropy": targets.entropy_N}
    for what, values in numbers.items():
        if values is None or not torch.isfinite(values).all():
            raise ValueError(f"{what} is not there or not finite. Check the teacher's weights")


def _binary(data: npt.NDArray[Any], lengths_R: Int64) -> pa.Array:
    """One value a row, of so many numbers each."""
    offsets_R1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths_R)]) * data.itemsize
    buffers = [None, pa.py_buffer(offsets_R1), pa.py_buffer(np.ascontiguousarray(data))]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(lengths_R), buffers)


@dataclass(frozen=True)
class SparseShard:
    """A shard as it lies on disk, decompressed; rows are decoded when they are asked for."""

    row_ids_R: Int64
    tokens_R: Int64
    form: SparseFormat
    alphabet: Alphabet
    table: pa.Table
    where: str

    @property
    def nbytes(self) -> int:
        return self.table.nbytes

    def targets(self, rows: Int64) -> SparseTargets:
        """Of these rows, by their index in the shard: the positions of the first, then of the second, and so on.

        Raises UserError where the bytes are not those of such targets.
        """
        taken = self.table.take(pa.array(rows))
        values = {name: _numbers(taken.column(name), DTYPES.get(name, "u1")) for name in self.form.columns}
        try:
            return decode(values, self.tokens_R[rows], self.form, self.alphabet)
        except (ValueError, IndexError) as error:
            raise UserError(f"{self.where}: is not laid out as its format says: {error}. {REMEDY}") from None


def read_sparse(store: Store, folder: str, entry: Entry, form: SparseFormat, alphabet: Alphabet) -> SparseShard:
    """A committed shard. Raises UserError when the file is not what the entry says or has not the format's columns."""
    where = store.where(f"{folder}/{entry.file}")
    with open_verified(store, folder, entry) as source:
        table = pq.ParquetFile(source).read(use_threads=False)
    if table.column_names != ["row_id", "tokens", *form.columns]:
        raise UserError(f"{where}: its columns are not those of codec {form.codec} with {form.kept} tokens. {REMEDY}")
    row_ids_R, tokens_R = (table.column(name).to_numpy().astype(np.int64) for name in ("row_id", "tokens"))
    # Without Arrow's own schema in the file the lengths come back as 32 bits, too few for a shard put together.
    wide = pa.schema([(column, pa.large_binary()) for column in form.columns])
    table = table.drop_columns(["row_id", "tokens"]).cast(wide).combine_chunks()
    return SparseShard(row_ids_R, tokens_R, form, alphabet, table, where)


def _numbers(column: pa.ChunkedArray, dtype: str) -> npt.NDArray[Any]:
    """What the values of a binary column hold, one value after the other."""
    array = pa.concat_arrays(column.chunks)
    offsets = np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1]
    data = array.buffers()[2]
    return np.frombuffer(b"" if data is None else data, np.uint8)[offsets[0] : offsets[-1]].view(dtype)
