"""Teacher, student and control over test rows, position by position, side by side: sums for every row.

Shapes: R rows, L tokens of the longest row, N positions, C of a chunk, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raydistill.data.token_shards import TokenShard, read_token_shard
from raydistill.data.tokens import pack_by_length, pad
from raydistill.losses.token_measures import own_measures, teacher_measures
from raydistill.models.loading import load_language_model
from raydistill.models.source import ModelSource
from raydistill.next_token import chunk_of, hidden_states, output_head
from raydistill.record.commit import Entry, commit_shard, committed_shard, open_verified
from raydistill.record.store import Store, naming, open_store
from raydistill.stages.language.scoring import check_finite
from raydistill.stages.scoring import DTYPES, TOKENS_PER_BATCH

BINS = 15
OWN, OF_TEACHER = ("nll", "accuracy"), ("kl", "agreement", "top5")
FOLDER = "report/tokens"


@dataclass(frozen=True)
class MeasuringJob:
    """Which models, the teacher first, over which shards, into which folder. Every field can be sent to a worker."""

    sources: tuple[tuple[str, ModelSource], ...]
    data_url: str
    output_url: str
    folder: str
    fingerprint: str
    vocabulary: int
    dtype: str
    tokens_per_batch: int | None
    features: None = None
    rows: None = None

    def scorer(self, threads: int) -> Measurer:
        return Measurer(self, threads)


class Measurer:
    """All models in eval mode on one device, for shards of token rows."""

    def __init__(self, job: MeasuringJob, threads: int) -> None:
        torch.set_num_threads(threads)
        self._job = job
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._data, self._output = open_store(job.data_url), open_store(job.output_url)
        self._models = {
            name: load_language_model(source.setting, source.folder(), dtype=DTYPES[job.dtype]).to(self._device)
            for name, source in job.sources
        }
        self._heads = {name: output_head(model, job.vocabulary) for name, model in self._models.items()}

    def score_shard(self, entry: Entry) -> tuple[Entry, dict[str, Any]]:
        """Measures and commits one shard, unless it stands."""
        name, facts = f"{self._job.folder}/{entry.file}", {"seconds": 0.0, "tokens": 0.0}
        if (standing := committed_shard(self._output, name, self._job.fingerprint)) is not None:
            return standing, facts
        shard, started = read_token_shard(self._data, entry), time.perf_counter()
        columns = self._measured(shard)
        seconds = time.perf_counter() - started
        made = write_measures(self._output, name, shard, columns, self._job.fingerprint)
        return made, {"seconds": seconds, "tokens": float(len(shard.tokens))}

    def _measured(self, shard: TokenShard) -> dict[str, np.ndarray]:
        """Sums over the positions of every row, by model and measure; bins are (R, 3 x BINS)."""
        sums: dict[str, np.ndarray] = {}
        budget = self._job.tokens_per_batch or TOKENS_PER_BATCH[self._device.type]
        with torch.inference_mode():
            for rows in pack_by_length(shard.lengths_R, budget):
                inputs = pad([shard.row(int(row)) for row in rows], 0)
                inputs = {name: value.to(self._device) for name, value in inputs.items()}
                found = self._batch(inputs, [shard.positions(int(row)) for row in rows], shard.row_ids_R[rows])
                for name, values in found.items():
                    sums.setdefault(name, np.zeros((len(shard), *values.shape[1:])))[rows] = values.cpu().numpy()
        return sums

    def _batch(
        self, inputs: dict[str, torch.Tensor], positions: list[np.ndarray], row_ids: np.ndarray
    ) -> dict[str, torch.Tensor]:
        """Sums over each row of a batch."""
        counts = [len(at) for at in positions]
        rows_N = torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(self._device)
        at_N = torch.from_numpy(np.concatenate(positions)).to(self._device)
        labels_N = inputs["input_ids"][rows_N, at_N + 1]
        hidden = {name: hidden_states(model, inputs)[rows_N, at_N] for name, model in self._models.items()}
        sums: dict[str, torch.Tensor] = {}
        for start in range(0, len(at_N), chunk := chunk_of(self._job.vocabulary)):
            cut = slice(start, start + chunk)
            teacher_CV: torch.Tensor | None = None
            for name, head in self._heads.items():
                logits_CV = head.logits(hidden[name][cut])
                check_finite(logits_CV, torch.from_numpy(row_ids)[rows_N[cut].cpu()], at_N[cut])
                found = own_measures(logits_CV, labels_N[cut])
                bins = _bins(found.pop("confidence"), found["accuracy"])
                if teacher_CV is not None:
                    found |= teacher_measures(logits_CV, teacher_CV)
                else:
                    teacher_CV = logits_CV
                for measure, values in [*found.items(), ("bins", bins)]:
                    key = f"{measure}_{name}"
                    if key not in sums:
                        sums[key] = torch.zeros(
                            (len(counts), *values.shape[1:]), dtype=torch.float64, device=self._device
                        )
                    sums[key].index_add_(0, rows_N[cut], values)
        return sums


def _bins(confidence_C: torch.Tensor, right_C: torch.Tensor) -> torch.Tensor:
    """(C, 3 x BINS): in the bin of its confidence each position's 1, its confidence, and whether it is right."""
    bin_C1 = (confidence_C * BINS).long().clamp(max=BINS - 1)[:, None]
    parts = (torch.ones_like(confidence_C), confidence_C, right_C)
    zeros = [torch.zeros(len(confidence_C), BINS, dtype=torch.float64, device=confidence_C.device) for _ in parts]
    return torch.cat([zero.scatter_(1, bin_C1, part[:, None]) for zero, part in zip(zeros, parts, strict=True)], dim=1)


def write_measures(
    store: Store, name: str, shard: TokenShard, columns: dict[str, np.ndarray], fingerprint: str
) -> Entry:
    """Commits sums of every row: row_id, document, positions, and a column for each model and measure."""
    arrays: dict[str, Any] = {
        "row_id": pa.array(shard.row_ids_R), "document": pa.array(shard.documents_R),
        "positions": pa.array(shard.learnt_R),
    }  # fmt: skip
    for column, values in columns.items():
        flat = pa.array(values.reshape(-1))
        arrays[column] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    staged = store.staging(name)
    with naming(staged):
        pq.write_table(pa.table(arrays), staged, compression="zstd", write_page_checksum=True)
    return commit_shard(store, staged, name, rows=len(shard), fingerprint=fingerprint)


def read_measures(store: Store, entries: list[Entry]) -> dict[str, np.ndarray]:
    """The columns of all shards, row by row. Raises UserError when a file is not what its entry says."""
    tables = []
    for entry in entries:
        with open_verified(store, FOLDER, entry) as source:
            tables.append(pq.ParquetFile(source).read(use_threads=False))
    table, found = pa.concat_tables(tables), {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        column = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
        is_list = pa.types.is_fixed_size_list(column.type)
        found[name] = np.array(column.flatten()).reshape(len(table), -1) if is_list else np.array(column)
    return found
