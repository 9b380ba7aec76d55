"""What the teacher gave to the text that stands there: at every position that is learnt from, the log-probability of
its next token, beside a cache of any codec.

A shard stands by each shard of the cache, as text-NAME, with the columns row_id, tokens (positions of the row) and
logprobs (binary, float16: nats, position after position). Of a log-probability 2^-11 of itself is lost at most, so that
also one near 0 keeps 11 bits.

Shapes: R rows, N positions, C of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raydistill.errors import UserError
from raydistill.record.commit import Entry, Manifest, commit_shard, open_verified
from raydistill.record.store import Store, naming

LEAST = -65504.0  # float16's; a token of less probability has this
Int64 = npt.NDArray[np.int64]


def text_shard(file: str) -> str:
    """The name of the shard that stands by one of the cache."""
    return f"text-{file}"


class TextLogprobs:
    """Takes logits as they are made, chunk by chunk, and keeps the log-probability of each position's own token."""

    def __init__(self, labels_N: torch.Tensor) -> None:
        self._labels_N, self._found = labels_N, list[torch.Tensor]()
        self._done = 0

    def of(self, to_logits: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """The function, watched: its calls must go over the positions in order."""

        def watched(given: torch.Tensor) -> torch.Tensor:
            logits_CV = to_logits(given)
            labels_C = self._labels_N[self._done : self._done + len(logits_CV)]
            of_labels_C = logits_CV.gather(1, labels_C[:, None])[:, 0].float()
            self._found.append((of_labels_C - logits_CV.float().logsumexp(dim=-1)).cpu())
            self._done += len(logits_CV)
            return logits_CV

        return watched

    @property
    def values_N(self) -> npt.NDArray[np.float32]:
        """Of all positions that have been seen."""
        assert self._done == len(self._labels_N), "not every position was seen"
        return torch.cat(self._found).numpy() if self._found else np.empty(0, np.float32)


def write_text_logprobs(
    store: Store, name: str, row_ids_R: Int64, positions_R: Int64, values_N: npt.NDArray[np.float32], fingerprint: str
) -> Entry:
    """Commits a shard. Raises ValueError for a number that is not finite."""
    assert len(values_N) == positions_R.sum()
    if not np.isfinite(values_N).all():
        raise ValueError("a log-probability of the text is not finite. Check the teacher's weights")
    kept_N = np.maximum(values_N, LEAST).astype("<f2")
    borders = np.cumsum([0, *positions_R])
    values = [kept_N[a:b].tobytes() for a, b in pairwise(borders)]
    arrays = {"row_id": pa.array(row_ids_R), "tokens": pa.array(positions_R, pa.int32())}
    arrays["logprobs"] = pa.array(values, pa.large_binary())
    staged = store.staging(name)
    with naming(staged):
        pq.write_table(
            pa.table(arrays), staged, compression="zstd", use_dictionary=False, write_page_checksum=True,
            store_schema=False,
        )  # fmt: skip
    return commit_shard(store, staged, name, rows=len(row_ids_R), fingerprint=fingerprint)


@dataclass(frozen=True)
class TextShard:
    """A shard as it was written."""

    borders_R1: Int64
    values_N: npt.NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        return self.borders_R1.nbytes + self.values_N.nbytes

    def row(self, index: int) -> npt.NDArray[np.float32]:
        return self.values_N[self.borders_R1[index] : self.borders_R1[index + 1]]


def read_text_logprobs(
    store: Store, folder: str, manifest: Manifest, file: str, *, row_ids_R: Int64, positions_R: Int64
) -> TextShard:
    """The shard that stands by one of the cache, with these rows. Raises UserError for another's."""
    entry = next(one for one in manifest.files if one.file == text_shard(file))
    with open_verified(store, folder, entry) as source:
        table = pq.ParquetFile(source).read(use_threads=False)
    ids_R, found_R = (table.column(name).to_numpy().astype(np.int64) for name in ("row_id", "tokens"))
    if not np.array_equal(ids_R, row_ids_R) or not np.array_equal(found_R, positions_R):
        where = store.where(f"{folder}/{entry.file}")
        raise UserError(f"{where}: holds other rows than its data shard. Score again with --redo teach")
    values = b"".join(table.column("logprobs").to_pylist())
    return TextShard(np.cumsum([0, *found_R]), np.frombuffer(values, "<f2").astype(np.float32))
