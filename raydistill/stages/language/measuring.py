"""The models of a report over test rows, position by position, side by side: sums for every row, and of every position
how certain a model was and whether it was right.

A student with a tokenizer of its own has other positions. Then each model is measured on its own tokens, and what is
summed of nll is that of the text that both tokenizers have in spans (data/spans), so that the bytes are the same.

Shapes: R rows, L tokens of the longest row, N positions, C of a chunk, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raydistill.data.student_rows import StudentShard, read_student_shard
from raydistill.data.token_shards import TokenShard, read_token_shard
from raydistill.data.tokens import pack_by_length, pad
from raydistill.exports.onnx_file import OnnxModel
from raydistill.losses.token_measures import own_measures, teacher_measures
from raydistill.models.source import ModelSource
from raydistill.next_token import chunk_of, hidden_states, output_head
from raydistill.record.commit import Entry, commit_shard, committed_shard, open_verified
from raydistill.record.store import Store, naming, open_store
from raydistill.stages.forward import DTYPES, TOKENS_PER_BATCH
from raydistill.stages.language.scoring import check_finite

TEACHER = "teacher"
OWN, OF_TEACHER = ("nll", "accuracy"), ("kl", "agreement", "top5")
FOLDER = "report/positions"
OF_POSITIONS = ("confidence", "right")


@dataclass(frozen=True)
class OwnRows:
    """Rows of a student with a tokenizer of its own, which are not the teacher's."""

    url: str
    entries: tuple[Entry, ...]
    vocabulary: int

    def shard(self, file: str) -> StudentShard:
        return read_student_shard(open_store(self.url), next(e for e in self.entries if e.file == file))


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
    own_rows: OwnRows | None = None
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
        self._models = {name: source.load_language(DTYPES[job.dtype]).to(self._device) for name, source in job.sources}
        own = job.own_rows.vocabulary if job.own_rows else job.vocabulary
        self._vocabularies = {name: job.vocabulary if name == TEACHER else own for name in self._models}
        self._budget = job.tokens_per_batch or TOKENS_PER_BATCH[self._device.type]
        if any(isinstance(model, OnnxModel) for model in self._models.values()):  # it makes whole logits
            self._budget = min(self._budget, chunk_of(max(job.vocabulary, own)))

    def score_shard(self, entry: Entry) -> tuple[Entry, dict[str, Any]]:
        """Measures and commits one shard, unless it stands."""
        name, facts = f"{self._job.folder}/{entry.file}", {"seconds": 0.0, "tokens": 0.0}
        if (standing := committed_shard(self._output, name, self._job.fingerprint)) is not None:
            return standing, facts
        shard, started = read_token_shard(self._data, entry), time.perf_counter()
        positions_R = shard.learnt_R
        if own := self._job.own_rows:
            positions_R, columns = self._apart(shard, own.shard(entry.file))
        else:
            columns = as_columns(self._measured(shard, list(self._models)), shard.learnt_R)
        seconds = time.perf_counter() - started
        made = write_measures(self._output, name, shard, positions_R, columns, self._job.fingerprint)
        return made, {"seconds": seconds, "tokens": float(len(shard.tokens))}

    def _apart(self, shard: TokenShard, own: StudentShard) -> tuple[np.ndarray, dict[str, pa.Array]]:
        """The bytes of every row's spans; the columns of the teacher on its rows and of the others on theirs."""
        columns: dict[str, pa.Array] = {}
        others = [name for name in self._models if name != TEACHER]
        for side, rows, names in (("teacher", shard, [TEACHER]), ("student", own.tokens, others)):
            columns |= as_columns(self._measured(rows, names, counted_N=own.in_spans(side)), rows.learnt_R)
            columns |= {f"positions_{name}": pa.array(rows.learnt_R) for name in names}
        return own.bytes_R, columns

    def _measured(
        self, shard: TokenShard, names: list[str], counted_N: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """By model and measure the sum over the positions of every row, (R,); of OF_POSITIONS each position's, (N,).

        With counted_N the nll of those positions alone is summed.
        """
        found: dict[str, np.ndarray] = {}
        counts_R = shard.learnt_R
        begins_R = np.cumsum(counts_R) - counts_R
        with torch.inference_mode():
            for rows in pack_by_length(shard.lengths_R, self._budget):
                inputs = pad([shard.row(int(row)) for row in rows], 0)
                inputs = {name: value.to(self._device) for name, value in inputs.items()}
                positions = [shard.positions(int(row)) for row in rows]
                places_N = np.concatenate(
                    [np.arange(b, b + len(at)) for b, at in zip(begins_R[rows], positions, strict=True)]
                )
                for name, values_N in self._batch(inputs, positions, shard.row_ids_R[rows], names).items():
                    if counted_N is not None and name.startswith("nll"):
                        values_N = values_N * counted_N[places_N]
                    if name.startswith(OF_POSITIONS):
                        found.setdefault(name, np.zeros(int(counts_R.sum()), np.float32))[places_N] = values_N
                    else:
                        rows_N = np.repeat(rows, [len(at) for at in positions])
                        found.setdefault(name, np.zeros(len(shard)))
                        np.add.at(found[name], rows_N, values_N)
        return found

    def _batch(
        self, inputs: dict[str, torch.Tensor], positions: list[np.ndarray], row_ids: np.ndarray, names: list[str]
    ) -> dict[str, np.ndarray]:
        """What is measured of every position of a batch, (N,), row after row."""
        rows_N = torch.from_numpy(np.repeat(np.arange(len(positions)), [len(at) for at in positions])).to(self._device)
        at_N = torch.from_numpy(np.concatenate(positions)).to(self._device)
        labels_N = inputs["input_ids"][rows_N, at_N + 1]
        vocabularies = {name: self._vocabularies[name] for name in names}
        logits = {name: _logits_at(self._models[name], inputs, rows_N, at_N, v) for name, v in vocabularies.items()}
        parts: dict[str, list[np.ndarray]] = {}
        for start in range(0, len(at_N), chunk := chunk_of(max(vocabularies.values()))):
            cut = slice(start, start + chunk)
            teacher_CV: torch.Tensor | None = None
            for name, of_cut in logits.items():
                logits_CV = of_cut(cut)
                check_finite(logits_CV, torch.from_numpy(row_ids)[rows_N[cut].cpu()], at_N[cut])
                found = own_measures(logits_CV, labels_N[cut])
                found["right"] = found["accuracy"]
                if teacher_CV is not None:
                    found |= teacher_measures(logits_CV, teacher_CV)
                elif name == TEACHER:
                    teacher_CV = logits_CV
                for measure, values_C in found.items():
                    parts.setdefault(f"{measure}_{name}", []).append(values_C.cpu().numpy())
        return {name: np.concatenate(found) for name, found in parts.items()}


def _logits_at(
    model: Any, inputs: dict[str, torch.Tensor], rows_N: torch.Tensor, at_N: torch.Tensor, vocabulary: int
) -> Callable[[slice], torch.Tensor]:
    """What gives a model's logits, float32 (C, V), at some of these positions, of which it is asked once here."""
    if isinstance(model, OnnxModel):
        logits_NV = model(**inputs).logits[rows_N, at_N, :vocabulary]
        return lambda cut: logits_NV[cut]
    head, hidden_ND = output_head(model, vocabulary), hidden_states(model, inputs)[rows_N, at_N]
    return lambda cut: head.logits(hidden_ND[cut])


def as_columns(found: dict[str, np.ndarray], learnt_R: np.ndarray) -> dict[str, pa.Array]:
    """For each model and measure a sum over each row's positions, or of OF_POSITIONS a list of what they have."""
    borders_R1 = pa.array(np.concatenate([np.zeros(1, np.int64), np.cumsum(learnt_R)]))
    columns: dict[str, pa.Array] = {}
    for name, values in found.items():
        flat = pa.array(values > 0.5 if name.startswith("right") else values)
        columns[name] = pa.LargeListArray.from_arrays(borders_R1, flat) if name.startswith(OF_POSITIONS) else flat
    return columns


def write_measures(
    store: Store, name: str, shard: TokenShard, positions_R: np.ndarray, columns: dict[str, pa.Array], fingerprint: str
) -> Entry:
    """Commits a row for each row: row_id, document, positions (what an nll is divided by), and the columns."""
    arrays: dict[str, Any] = {
        "row_id": pa.array(shard.row_ids_R), "document": pa.array(shard.documents_R),
        "positions": pa.array(positions_R), **columns,
    }  # fmt: skip
    staged = store.staging(name)
    with naming(staged):
        pq.write_table(pa.table(arrays), staged, compression="zstd", write_page_checksum=True)
    return commit_shard(store, staged, name, rows=len(shard), fingerprint=fingerprint)


def read_measures(store: Store, entries: list[Entry]) -> dict[str, np.ndarray]:
    """The columns of all shards, row by row; of OF_POSITIONS position by position.

    Raises UserError when a file is not what its entry says.
    """
    tables = []
    for entry in entries:
        with open_verified(store, FOLDER, entry) as source:
            tables.append(pq.ParquetFile(source).read(use_threads=False))
    table, found = pa.concat_tables(tables), {}
    for name in table.column_names:
        parts = [chunk.flatten() if name.startswith(OF_POSITIONS) else chunk for chunk in table.column(name).chunks]
        found[name] = np.concatenate([part.to_numpy(zero_copy_only=False) for part in parts])
    return found
