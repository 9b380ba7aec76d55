"""Which fold each train row is in, for teachers that score rows they have not learned from.

Folds are stratified by label. Rows with the same text (without case, with runs of white space as one space) are in one
fold, so that a teacher has not seen a row's twin either. The assignment stands in `teacher/folds`, one shard for each
data shard with the same rows in the same order.

Shapes: N rows, G different texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.errors import UserError
from raydistill.record.commit import Entry, Manifest, commit_shard, open_verified, read_manifest
from raydistill.record.store import Store, naming, open_store

FOLDER = "teacher/folds"
SCHEMA = pa.schema([pa.field("row_id", pa.int64(), nullable=False), pa.field("fold", pa.int8(), nullable=False)])


def assign_folds(
    strata_N: npt.NDArray[np.int64], texts_N: npt.NDArray[np.uint64], *, folds: int, seed: int
) -> npt.NDArray[np.int8]:
    """The fold of every row, from 0: a function of its arguments alone.

    strata_N: the rows' labels; texts_N: what equal texts have in common. Texts take the stratum of their first row. The
    texts of a stratum are shuffled by (seed, stratum) and dealt to the folds in turn, each stratum going on where the
    one before it ended: within a stratum, and in all, folds differ by at most one text. Raises ValueError when there
    are fewer texts than folds.
    """
    _, first_G, text_N = np.unique(texts_N, return_index=True, return_inverse=True)
    if len(first_G) < folds:
        raise ValueError(f"{len(first_G)} different texts cannot fill {folds} folds")
    stratum_G = strata_N[first_G]
    by_stratum_G = np.lexsort((first_G, stratum_G))
    strata, starts = np.unique(stratum_G[by_stratum_G], return_index=True)
    fold_G = np.empty(len(first_G), np.int8)
    for stratum, start, texts in zip(strata, starts, np.split(by_stratum_G, starts[1:]), strict=True):
        # numpy's seeds are not negative, and the label of a row without one is.
        mixed = np.random.default_rng([seed, int(stratum) & 0xFFFFFFFF]).permutation(texts)
        fold_G[mixed] = (start + np.arange(len(mixed))) % folds
    return fold_G[text_N]


def write_folds(
    store: Store,
    name: str,
    row_ids_N: npt.NDArray[np.int64],
    folds_N: npt.NDArray[np.int8],
    *,
    fingerprint: str,
    folder: str = FOLDER,
) -> Entry:
    """Commits the folds of one shard's rows."""
    staged = store.staging(f"{folder}/{name}")
    table = pa.Table.from_arrays([pa.array(row_ids_N), pa.array(folds_N)], schema=SCHEMA)
    with naming(staged):
        pq.write_table(table, staged, compression="zstd", write_page_checksum=True, store_schema=False)
    return commit_shard(store, staged, f"{folder}/{name}", rows=len(table), fingerprint=fingerprint)


@dataclass(frozen=True)
class FoldRows:
    """The train rows of a fold (`inside`), or all others. Can be sent to a worker."""

    store_url: str
    fold: int
    inside: bool
    folder: str = FOLDER
    stage: str = "teach"  # that makes the folder

    def open(self) -> OpenFolds:
        """With the assignment at hand. Raises UserError when it is not complete."""
        store = open_store(self.store_url)
        manifest = read_manifest(store, self.folder)
        if manifest is None:
            where = store.where(self.folder)
            raise UserError(f"{where}: is not complete. Run `raydistill {self.stage}` with its config first")
        return OpenFolds(self, store, manifest)


@dataclass(frozen=True)
class OpenFolds:
    """A choice of rows with the files that say which they are."""

    rows: FoldRows
    store: Store
    manifest: Manifest

    def count(self, file: str) -> int:
        """How many rows of a data shard are chosen."""
        counts = self.manifest.facts["rows"][file]
        return counts[self.rows.fold] if self.rows.inside else sum(counts) - counts[self.rows.fold]

    def chosen(self, file: str, row_ids_N: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which rows of a data shard are chosen. Raises UserError when the folds are of other rows."""
        entry = next(entry for entry in self.manifest.files if entry.file == file)
        with open_verified(self.store, self.rows.folder, entry) as source:
            table = pq.ParquetFile(source).read(use_threads=False)
        if not np.array_equal(table.column("row_id").to_numpy(), row_ids_N):
            where = self.store.where(f"{self.rows.folder}/{entry.file}")
            raise UserError(f"{where}: holds other rows than its data shard. Use --redo {self.rows.stage}")
        return (table.column("fold").to_numpy() == self.rows.fold) == self.rows.inside
