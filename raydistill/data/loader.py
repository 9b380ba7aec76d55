"""A worker's batches: tokens, labels and the teacher's logits (and features) of its rows, joined by row id, read ahead.

Shapes: N rows, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raydistill.cache.feature_shards import FeatureShard, read_features
from raydistill.cache.shards import LogitShard, read_logits
from raydistill.data.exclusion import Exclusion
from raydistill.data.feature_targets import FOLDER, CachedFeatures
from raydistill.data.folds import FoldRows
from raydistill.data.held_shards import HeldShards
from raydistill.data.order import epoch_batches
from raydistill.data.shards import DataShard, read_shard
from raydistill.data.tokens import Tokens, pack_by_length, pad, tokenise
from raydistill.errors import UserError
from raydistill.record.commit import Entry, Manifest
from raydistill.record.store import Store
from raydistill.targets import TeacherTargets


@dataclass(frozen=True)
class Batch:
    """The rows of one micro-batch; `rows` counts those that are real (a rank without rows gets one of weight 0)."""

    inputs: dict[str, torch.Tensor]
    labels_N: torch.Tensor  # or (N, K) for sets of labels
    teacher: TeacherTargets | None
    rows: int


@dataclass(frozen=True)
class Shard:
    """A shard as training needs it."""

    tokens: Tokens
    labels_N: npt.NDArray[np.integer]  # int64, or (N, K) int8 for sets of labels
    logits_NK: npt.NDArray[np.float32] | None
    features: FeatureShard | None = None
    excluded_N: npt.NDArray[np.bool_] | None = None  # from what the teacher says

    @property
    def nbytes(self) -> int:
        targets = (part.nbytes for part in (self.logits_NK, self.features, self.excluded_N) if part is not None)
        return self.tokens.nbytes + self.labels_N.nbytes + sum(targets)


class Split:
    """One split of the data, or several as one, with its share of the teacher's cache, and of its cached features.

    The teacher's logits are divided by its temperature when they are read: a calibrated teacher's cache is kept raw.
    `rows` leaves the others out as if they were not in the data; the order of what is left depends on (seed, epoch)
    alone. `exclusion` says which rows are not learned from the teacher.
    """

    def __init__(
        self,
        store: Store,
        split: str | tuple[str, ...],
        data: Manifest,
        cache: Manifest | None,
        *,
        tokenizer: Any,
        max_length: int,
        teacher_temperature: float = 1.0,
        features: CachedFeatures | None = None,
        rows: FoldRows | None = None,
        cache_store: Store | None = None,
        cache_folder: str = "teacher/cache",
        exclusion: Exclusion | None = None,
    ) -> None:
        self._store, self._cache, self._tokenizer, self._max_length = store, cache, tokenizer, max_length
        self._teacher_temperature = teacher_temperature
        self._cache_store, self._cache_folder = cache_store or store, cache_folder
        splits = (split,) if isinstance(split, str) else split
        self.entries = data.shards(*splits)
        self._logits: list[Entry] | list[None] = [None] * len(self.entries)
        if cache is not None:
            self._logits = pair_entries(self.entries, cache.shards(*splits), cache_folder)
        self._features = features
        kept = features.manifest.shards(*splits) if features else []
        self._feature_entries = pair_entries(self.entries, kept, FOLDER) if features else []
        self._chosen = rows.open() if rows else None
        self.shard_rows = [self._chosen.count(e.file) if self._chosen else e.rows for e in self.entries]
        self.rows = sum(self.shard_rows)
        self._exclusion = exclusion
        self._held = HeldShards(self._load)

    @property
    def has_teacher(self) -> bool:
        """Whether batches carry the teacher's logits."""
        return self._cache is not None

    def _load(self, number: int) -> Shard:
        rows = read_shard(self._store, self.entries[number])
        logits = None
        if (entry := self._logits[number]) is not None:
            assert self._cache is not None
            logits = self._join(
                rows.row_ids_N, read_logits(self._cache_store, self._cache_folder, entry, self._cache), entry
            )
        whole, chosen_N = rows, self._chosen.chosen(rows.name, rows.row_ids_N) if self._chosen else None
        if chosen_N is not None:
            rows, logits = rows.where(chosen_N), None if logits is None else logits[chosen_N]
        excluded = None
        if self._exclusion is not None and logits is not None:
            excluded = self._exclusion.excluded(rows.row_ids_N, rows.labels_N, logits)
        tokens = tokenise(self._tokenizer, rows.texts, self._max_length)
        labels = rows.labels_N if rows.labels_N.ndim > 1 else rows.labels_N.astype(np.int64)
        if self._features is None:
            return Shard(tokens, labels, logits, None, excluded)
        if chosen_N is None:
            return Shard(tokens, labels, logits, self._read_features(number, whole, tokens), excluded)
        # The cache holds all rows of a shard, and is checked against all of them.
        all_tokens = tokenise(self._tokenizer, whole.texts, self._max_length)
        return Shard(tokens, labels, logits, self._read_features(number, whole, all_tokens).where(chosen_N), excluded)

    def _read_features(self, number: int, rows: DataShard, tokens: Tokens) -> FeatureShard:
        assert self._features is not None
        return read_features(
            self._store, FOLDER, self._feature_entries[number], self._features.manifest,
            row_ids_N=rows.row_ids_N, tokens_N=tokens.lengths_N, names=self._features.names,
        )  # fmt: skip

    def _join(self, row_ids_N: npt.NDArray[np.int64], cached: LogitShard, entry: Entry) -> npt.NDArray[np.float32]:
        if not np.array_equal(row_ids_N, cached.row_ids_N):
            where = self._cache_store.where(f"{self._cache_folder}/{entry.file}")
            raise UserError(f"{where}: holds other rows than its data shard. {_again(self._cache_folder)}")
        return cached.logits_NK if self._teacher_temperature == 1 else cached.logits_NK / self._teacher_temperature

    def batch(self, places: npt.NDArray[np.int64], rows: int | None = None) -> Batch:
        """The batch of these (shard, row) pairs."""
        shards = {int(n): self._held[int(n)] for n in np.unique(places[:, 0])}
        tokens = [shards[int(s)].tokens.row(int(r)) for s, r in places]
        labels = torch.from_numpy(np.array([shards[int(s)].labels_N[r] for s, r in places]))
        teacher = None
        if self._cache is not None:
            logits = np.stack([shards[int(s)].logits_NK[r] for s, r in places])  # type: ignore[index]
            excluded = self._excluded(shards, places)
            teacher = TeacherTargets(torch.from_numpy(logits), self._features_of(shards, places), excluded)
        return Batch(pad(tokens, self._tokenizer.pad_token_id), labels, teacher, len(places) if rows is None else rows)

    def _excluded(self, shards: dict[int, Shard], places: npt.NDArray[np.int64]) -> torch.Tensor | None:
        if self._exclusion is None:
            return None
        masks = [(shards[int(s)].excluded_N, int(r)) for s, r in places]
        return torch.tensor([mask is not None and bool(mask[row]) for mask, row in masks])

    def _features_of(
        self, shards: dict[int, Shard], places: npt.NDArray[np.int64]
    ) -> tuple[tuple[torch.Tensor, ...], ...]:
        if self._features is None:
            return ()
        rows = [(shard, int(r)) for s, r in places if (shard := shards[int(s)].features) is not None]
        return self._features.batch(rows, max(int(shard.tokens_N[row]) for shard, row in rows))

    def training_steps(
        self, *, seed: int, epoch: int, batch_size: int, first_step: int, rank: int, world: int, accumulation: int,
        by_length: bool = False,
    ) -> Iterator[tuple[int, Callable[[], Iterator[Batch]]]]:  # fmt: skip
        """(global row count, this rank's micro-batches) of every step of an epoch from first_step on."""
        order = epoch_batches(
            self.shard_rows, seed=seed, epoch=epoch, batch_size=batch_size, first_step=first_step,
            lengths=self._lengths if by_length else None,
        )  # fmt: skip
        for places, needed in order:
            self._held.need({*needed, *places[:, 0].tolist()})
            self._held.read_ahead(needed)
            yield len(places), lambda places=places: self._micro_batches(places, rank, world, accumulation)

    def _lengths(self, number: int) -> npt.NDArray[np.integer]:
        self._held.need_too(number)  # the batches that come hold its rows
        return self._held[number].tokens.lengths_N

    def _micro_batches(
        self, places: npt.NDArray[np.int64], rank: int, world: int, accumulation: int
    ) -> Iterator[Batch]:
        for micro in range(accumulation):
            part = np.array_split(places, world * accumulation)[rank * accumulation + micro]
            yield self.batch(part) if len(part) else self.batch(places[:1], rows=0)

    def length_batches(self, tokens_per_batch: int) -> Iterator[Batch]:
        """Every row once, shard by shard, packed by length."""
        for number in range(len(self.entries)):
            for rows in pack_by_length(self._held[number].tokens.lengths_N, tokens_per_batch):
                yield self.batch(np.stack([np.full(len(rows), number), rows], axis=1))

    def close(self) -> None:
        self._held.close()


def pair_entries(data: list[Entry], cache: list[Entry], folder: str = "teacher/cache") -> list[Entry]:
    """The cache's shard of every data shard. Raises UserError when one is missing or has another number of rows."""
    by_name = {entry.file: entry for entry in cache}
    for entry in data:
        other = by_name.get(entry.file)
        if other is None or other.rows != entry.rows:
            found = "none" if other is None else f"one of {other.rows} rows"
            raise UserError(
                f"{folder}/{entry.file}: expected a shard of {entry.rows} rows, found {found}. {_again(folder)}"
            )
    return [by_name[entry.file] for entry in data]


def _again(folder: str) -> str:
    return f"Score again with --redo {'teach' if folder.startswith('teacher/') else 'train'}"
