"""A model over data shards: Ray Data maps actors over shard descriptors, one task makes one shard of logits.

What flows through Ray Data are names of shards; the actor reads its shard, sorts it by length, packs token-budget
batches, scores, and commits the shard of logits itself. A retried task writes the same bytes. While one shard is in
the forward pass, the actor's second thread reads and tokenises the next.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

from raydistill.cache.shards import write_logits
from raydistill.data.folds import FoldRows
from raydistill.data.shards import DataShard, read_shard
from raydistill.data.tokens import Tokens
from raydistill.errors import UserError, storage_problem
from raydistill.models.source import ModelSource
from raydistill.record.commit import Entry, Manifest, committed_shard
from raydistill.record.store import open_store
from raydistill.stages.cluster import Share
from raydistill.stages.feature_scoring import FeatureOutput, FeatureScorer, ShardOfFeatures
from raydistill.stages.forward import Forward
from raydistill.stages.progress import Progress


class Job(Protocol):
    """What a pass over shards must know of its job, whatever the task; `scorer` is called in the worker."""

    @property
    def output_url(self) -> str: ...
    @property
    def folder(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def features(self) -> FeatureOutput | None: ...
    @property
    def rows(self) -> FoldRows | None: ...

    def scorer(self, threads: int) -> Any: ...


@dataclass(frozen=True)
class ScoringJob:
    """Which model, over which shards, into which folder. Every field can be sent to a worker."""

    source: ModelSource
    labels: tuple[str, ...]
    data_url: str
    output_url: str
    folder: str
    fingerprint: str
    codec: str
    dtype: str
    max_length: int
    tokens_per_batch: int | None
    features: FeatureOutput | None = None  # written beside the logits by the same forward
    rows: FoldRows | None = None  # of each shard; absent: all

    def scorer(self, threads: int) -> Scorer:
        return Scorer(self, threads=threads)


class Scorer:
    """A model in eval mode on its device, for shards of texts."""

    def __init__(self, job: ScoringJob, device: str | None = None, threads: int | None = None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._job = job
        self._data, self._output = open_store(job.data_url), open_store(job.output_url)
        self.forward = Forward(
            job.source, job.labels, max_length=job.max_length, dtype=job.dtype, device=device,
            tokens_per_batch=job.tokens_per_batch,
        )  # fmt: skip
        self._features = FeatureScorer(job.features, self.forward.model, self._output) if job.features else None
        self._versions = self._written_counts()
        self._rows = job.rows.open() if job.rows else None
        self._one_at_a_time = threading.Lock()

    def score_shard(self, entry: Entry) -> tuple[Entry, dict[str, float]]:
        """Scores and commits one shard: its entry, and the seconds and tokens it took.

        A shard that a lost actor had committed before its record came back is kept.
        """
        name = f"{self._job.folder}/{entry.file}"
        standing = committed_shard(self._output, name, self._job.fingerprint)
        features = self._features if self._features and self._features.output.wants(entry) else None
        kept = features.output.standing(self._output, entry) if features else None
        if standing is not None and (kept or not features):
            return standing, {"seconds": 0.0, "tokens": 0.0, "at_max_length": 0, **_of_features(kept)}
        rows = read_shard(self._data, entry)
        if self._rows:
            rows = rows.where(self._rows.chosen(rows.name, rows.row_ids_N))
        tokens = self.forward.tokens(rows.texts)
        with features.writing(rows, tokens) if features and not kept else contextlib.nullcontext() as writer:
            with self._one_at_a_time:
                started = time.perf_counter()
                logits = self.logits(tokens, writer)
                seconds = time.perf_counter() - started
                self._check_frozen()
            self._check_finite(rows, logits)
            made = standing or self._write(entry, rows, logits)
            if writer:
                kept = writer.commit()
        lengths = tokens.lengths_N
        truncated = int((lengths >= self._job.max_length).sum())
        facts = {"seconds": seconds, "tokens": float(lengths.sum()), "at_max_length": truncated}
        return made, {**facts, **_of_features(kept)}

    def _write(self, entry: Entry, rows: DataShard, logits: np.ndarray) -> Entry:
        job, name = self._job, f"{self._job.folder}/{entry.file}"
        try:
            return write_logits(
                self._output, name, rows.row_ids_N, logits, codec=job.codec, fingerprint=job.fingerprint
            )
        except ValueError as error:
            raise UserError(f"{job.source.setting}: shard {entry.file}: {error}") from None

    def logits(self, tokens: Tokens, writer: ShardOfFeatures | None = None) -> np.ndarray:
        """float32 logits of every row in the order of the data's labels; the rows' features go to the writer."""
        features = self._features
        look = None if features is None else lambda batch, mask_NL: features.take(batch, mask_NL, writer)
        return self.forward.logits(tokens, look)

    def _check_finite(self, rows: DataShard, logits: np.ndarray) -> None:
        broken = ~np.isfinite(logits).all(axis=1)
        if broken.any():
            raise UserError(
                f"{self._job.source.setting}: its output for row {rows.row_ids_N[broken][0]} (shard {rows.name}) is not"
                f" finite, like {int(broken.sum()) - 1} more. Check its weights, or use teacher.dtype=float32"
            )

    def _written_counts(self) -> int:
        """torch counts in-place writes to each tensor; the sum stays the same while nothing writes to the weights."""
        return sum(p._version for p in self.forward.model.parameters())

    def _check_frozen(self) -> None:
        assert not self.forward.model.training, "the model left eval mode"
        assert not any(p.requires_grad for p in self.forward.model.parameters()), (
            "a weight of the model asks for a gradient"
        )
        assert self._written_counts() == self._versions, "the model's weights were written to while it scored"


class ScoringActor:
    """Scorers as a Ray Data UDF: one task (a job's number and a shard) in, one small record out.

    A model is loaded when its first task comes and takes the place of the one before. What the user must mend comes
    back as text, because an exception would be retried.
    """

    def __init__(self, jobs: tuple[Job, ...], threads: int) -> None:
        self._jobs, self._threads = jobs, threads
        self._loading = threading.Lock()
        self._number, self._scorer = -1, None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        task = {name: values[0].item() if hasattr(values[0], "item") else values[0] for name, values in batch.items()}
        entry = Entry(**{name: task[name] for name in ENTRY_FIELDS})
        record = {"problem": "", "seconds": 0.0, "tokens": 0.0, "at_max_length": 0, **_of_features(None), **task}
        try:
            made, facts = self._scorer_of(task["job"]).score_shard(entry)
            record |= {**asdict(made), **facts}
        except UserError as error:
            record["problem"] = str(error)
        except OSError as error:
            if (problem := storage_problem(error)) is None:
                raise
            record["problem"] = str(problem)
        return {name: [value] for name, value in record.items()}

    def _scorer_of(self, number: int) -> Any:
        with self._loading:
            if self._scorer is None or number != self._number:
                self._scorer = None  # the old model leaves before the new one comes
                self._scorer = self._jobs[number].scorer(self._threads)
                self._number = number
            return self._scorer


def _of_features(entry: Entry | None) -> dict[str, Any]:
    """A shard of features, or that there is none, in the columns of a record."""
    return {"features_sha256": entry.sha256 if entry else "", "features_size": entry.size if entry else 0}


ENTRY_FIELDS = ("file", "sha256", "size", "rows")
TOTALS = ("rows", "tokens", "seconds", "at_max_length")


@dataclass(frozen=True)
class Scored:
    """The committed shards of one job in order, those made now, and sums over the records of what was scored.

    features: its committed shards of features in order.
    """

    entries: list[Entry]
    made: list[Entry]
    totals: dict[str, float]
    features: list[Entry]


def score(
    jobs: Sequence[Job],
    data: Manifest,
    splits: dict[str, tuple[str, ...]],
    share: Share,
    progress: Progress,
    what: str,
) -> list[Scored]:
    """Scores for every job the shards of its splits (by its folder) that are not committed yet, on one actor pool.

    Raises UserError for what a worker found wrong, Interrupted after a signal; committed shards stay in both cases.
    """
    wanted = [_wanted(job, data, splits[job.folder]) for job in jobs]
    done = [_committed(job, list(counts)) for job, counts in zip(jobs, wanted, strict=True)]
    features = [_committed_features(job, list(counts)) for job, counts in zip(jobs, wanted, strict=True)]
    totals: list[dict[str, float]] = [dict.fromkeys(TOTALS, 0.0) for _ in jobs]
    missing = [
        {"job": number, "expected": count, **asdict(entry)}
        for number, counts in enumerate(wanted)
        for entry, count in counts.items()
        if entry.file not in done[number] or (entry.file, None) in features[number].items()
    ]
    kept, started, rows = sum(map(len, wanted)) - len(missing), time.monotonic(), 0
    if kept and missing:
        progress.say(f"{what}: {kept} of {kept + len(missing)} shards are committed and kept")
    for record in _map_shards(tuple(jobs), missing, share, progress) if missing else ():
        if record["problem"]:
            raise UserError(record["problem"])
        made = Entry(**{name: record[name] for name in ENTRY_FIELDS})
        done[record["job"]][made.file] = made
        if record["features_sha256"]:
            kept_features = Entry(made.file, record["features_sha256"], record["features_size"], made.rows)
            features[record["job"]][made.file] = kept_features
        for name in TOTALS:
            totals[record["job"]][name] += record[name]
        rows += record["rows"]
        progress.counts(what, rows, sum(task["expected"] for task in missing), "rows", started)
        progress.check()
    new = [{task["file"] for task in missing if task["job"] == number} for number in range(len(jobs))]
    return [
        Scored([d[e.file] for e in w], [d[e.file] for e in w if e.file in n], t, [x for x in f.values() if x])
        for w, d, f, n, t in zip(wanted, done, features, new, totals, strict=True)
    ]


def _wanted(job: Job, data: Manifest, splits: tuple[str, ...]) -> dict[Entry, int]:
    """The data shards that have rows for the job, in order, and how many."""
    entries = [entry for split in splits for entry in data.shards(split)]
    if job.rows is None:
        return {entry: entry.rows for entry in entries}
    rows = job.rows.open()
    return {entry: count for entry in entries if (count := rows.count(entry.file))}


def _committed(job: Job, entries: list[Entry]) -> dict[str, Entry]:
    output = open_store(job.output_url)
    found = (committed_shard(output, f"{job.folder}/{entry.file}", job.fingerprint) for entry in entries)
    return {entry.file: entry for entry in found if entry}


def _committed_features(job: Job, entries: list[Entry]) -> dict[str, Entry | None]:
    """The shard of features of every data shard that needs one, None where it is not committed yet."""
    output, asked = open_store(job.output_url), job.features
    return {entry.file: asked.standing(output, entry) for entry in entries if asked and asked.wants(entry)}


def _map_shards(
    jobs: tuple[Job, ...], tasks: list[dict[str, Any]], share: Share, progress: Progress
) -> Iterator[dict[str, Any]]:
    """Runs the actor pool over the tasks; records come in the order in which they end."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    actors = min(share.processes, len(tasks))
    records = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        ScoringActor,
        fn_constructor_args=(jobs, share.cpus),
        batch_size=1,
        batch_format="numpy",
        num_cpus=share.cpus,
        num_gpus=share.gpus or None,
        compute=ray.data.ActorPoolStrategy(
            size=actors,
            max_tasks_in_flight_per_actor=2,
            enable_true_multi_threading=True,
            max_concurrent_calls_per_actor=2,
        ),
    )
    progress.check()
    yield from records.iter_rows()
