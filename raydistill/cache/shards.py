"""A shard of the teacher cache: row ids and encoded logits in one Parquet file, written once and read without a copy.

Shapes: N rows, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.cache.codecs import CODECS, Float32
from raydistill.record.commit import Entry, Manifest, commit_shard, open_verified
from raydistill.record.store import Store, naming


@dataclass(frozen=True)
class LogitShard:
    """The decoded rows of a shard, in the order of its data shard."""

    row_ids_N: npt.NDArray[np.int64]
    logits_NK: Float32


def write_logits(
    store: Store, name: str, row_ids_N: npt.NDArray[np.int64], logits_NK: Float32, *, codec: str, fingerprint: str
) -> Entry:
    """Commits a shard of logits. Raises ValueError when a value is not finite or does not fit the codec."""
    if not np.isfinite(logits_NK).all():
        raise ValueError(f"row {row_ids_N[~np.isfinite(logits_NK).all(axis=1)][0]} has a logit that is not finite")
    kept = CODECS[codec]
    schema = pa.schema([pa.field("row_id", pa.int64(), nullable=False), *kept.columns(logits_NK.shape[1])])
    table = pa.Table.from_arrays([pa.array(row_ids_N), *kept.encode(logits_NK)], schema=schema)
    staged = store.staging(name)
    with naming(staged):
        pq.write_table(
            table,
            staged,
            compression="NONE",
            use_dictionary=False,
            column_encoding={"row_id": "DELTA_BINARY_PACKED"},
            write_statistics=False,
            write_page_checksum=True,
            store_schema=False,
            row_group_size=max(1, len(table)),
        )
    return commit_shard(store, staged, name, rows=len(table), fingerprint=fingerprint)


def read_logits(store: Store, folder: str, entry: Entry, manifest: Manifest) -> LogitShard:
    """The rows of a committed shard. Raises UserError when the file is not what the manifest says."""
    with open_verified(store, folder, entry) as source:
        table = pq.ParquetFile(source).read(use_threads=False)
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        arrays = {name: c.chunk(0) if isinstance(c, pa.ChunkedArray) else c for name, c in columns.items()}
        row_ids_N = arrays["row_id"].to_numpy()
        logits_NK = CODECS[manifest.facts["codec"]].decode(arrays, manifest.facts["classes"])
    return LogitShard(row_ids_N, logits_NK)
