"""The order of a vocabulary by frequency: ids are kept as ranks in it, so that most of them are small numbers.

One alphabet serves a whole cache and is written once beside its shards, so that a shard's bytes do not depend on
another's. Counts of the tokens that the teacher reads are a good one: what it predicts is much like what comes.

Shapes: V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.cache.gap_coding import LARGEST
from raydistill.errors import UserError
from raydistill.record.commit import Entry, commit_shard, open_verified
from raydistill.record.store import Store, naming

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Alphabet:
    """ids_V are the token ids from the most frequent on, ranks_V the place of each id among them."""

    ids_V: Int32
    ranks_V: Int32

    @classmethod
    def by_counts(cls, counts_V: npt.NDArray[np.int64]) -> Alphabet:
        """Ids by falling count; of equal ones the smaller id first, as tokenizers number frequent tokens earlier.

        Raises ValueError for a vocabulary of more than 2^20 tokens.
        """
        if len(counts_V) > LARGEST + 1:
            raise ValueError(f"a vocabulary has at most {LARGEST + 1} tokens, found {len(counts_V)}")
        return cls._of(np.argsort(-counts_V, kind="stable"))

    @classmethod
    def _of(cls, ids_V: npt.NDArray[np.int64]) -> Alphabet:
        ranks_V = np.empty(len(ids_V), np.int32)
        ranks_V[ids_V] = np.arange(len(ids_V), dtype=np.int32)
        return cls(ids_V.astype(np.int32), ranks_V)

    @property
    def size(self) -> int:
        return len(self.ids_V)

    def write(self, store: Store, name: str, fingerprint: str) -> Entry:
        """Commits it as a Parquet file of one column, `id`, in the order of ranks."""
        staged = store.staging(name)
        with naming(staged):
            pq.write_table(
                pa.table({"id": self.ids_V}), staged, compression="ZSTD", use_dictionary=False, write_statistics=False,
                write_page_checksum=True, store_schema=False,
            )  # fmt: skip
        return commit_shard(store, staged, name, rows=self.size, fingerprint=fingerprint)

    @classmethod
    def read(cls, store: Store, folder: str, entry: Entry) -> Alphabet:
        """Raises UserError when the file is not what the entry says, or does not hold every id once."""
        with open_verified(store, folder, entry) as source:
            ids_V = pq.ParquetFile(source).read(use_threads=False).column("id").to_numpy().astype(np.int64)
        if not np.array_equal(np.sort(ids_V), np.arange(len(ids_V))):
            where = store.where(f"{folder}/{entry.file}")
            raise UserError(f"{where}: does not hold every id once. Score again with --redo teach")
        return cls._of(ids_V)
