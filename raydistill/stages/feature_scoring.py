"""The teacher's features beside its logits: which shards of them are missing, and what writes one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raydistill.cache.feature_shards import FeatureColumn, FeatureWriter
from raydistill.data.shards import DataShard
from raydistill.data.tokens import Tokens
from raydistill.errors import UserError
from raydistill.feature_tap import FeatureTap
from raydistill.losses.cached_features import pick, tap_arguments
from raydistill.record.commit import Entry, committed_shard
from raydistill.record.store import Store


@dataclass(frozen=True)
class FeatureOutput:
    """Which features, of the shards of which splits, into which folder. Every field can be sent to a worker."""

    folder: str
    fingerprint: str
    codec: str
    columns: tuple[FeatureColumn, ...]
    splits: tuple[str, ...]

    def wants(self, entry: Entry) -> bool:
        """Whether features of this data shard are asked for."""
        return entry.file.rpartition("-")[0] in self.splits

    def standing(self, store: Store, entry: Entry) -> Entry | None:
        """The committed shard of features of this data shard."""
        return committed_shard(store, f"{self.folder}/{entry.file}", self.fingerprint)


class FeatureScorer:
    """A model whose every forward leaves its features, for the shard that is being written.

    The tap stays open, so that a shard's logits are the same bytes whether its features stand already or not: attention
    maps exist only in transformers' eager attention, whose last digits are its own.
    """

    def __init__(self, output: FeatureOutput, model: Any, store: Store) -> None:
        self.output, self._store = output, store
        self._names = [column.name for column in output.columns]
        self._tap = FeatureTap(model, **tap_arguments(self._names))
        self._tap.__enter__()

    @contextlib.contextmanager
    def writing(self, rows: DataShard, tokens: Tokens) -> Iterator[ShardOfFeatures]:
        """A shard of features of these rows, which is gone unless it was committed."""
        output = self.output
        with FeatureWriter(self._store, f"{output.folder}/{rows.name}", output.columns, output.codec) as writer:
            yield ShardOfFeatures(writer, rows, tokens, output.fingerprint)

    def take(self, batch: npt.NDArray[np.int64], mask_NL: torch.Tensor, writer: ShardOfFeatures | None) -> None:
        """Takes what the forward over these rows of a shard left; it is forgotten where nothing is to be written."""
        features = self._tap.take()
        if writer:
            writer.add(batch, {name: pick(features, name, mask_NL) for name in self._names})


@dataclass(frozen=True)
class ShardOfFeatures:
    """A shard of features that is being written."""

    writer: FeatureWriter
    rows: DataShard
    tokens: Tokens
    fingerprint: str

    def add(self, batch: npt.NDArray[np.int64], found: dict[str, torch.Tensor]) -> None:
        """These rows' features. Raises UserError for a number that cannot be kept."""
        with self._telling():
            self.writer.add(self.rows.row_ids_N[batch], self.tokens.lengths_N[batch], found)

    def commit(self) -> Entry:
        """The committed shard. Raises UserError for a row that is too large."""
        with self._telling():
            return self.writer.commit(self.fingerprint)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise UserError(f"train.loss.features: shard {self.rows.name}: {error}") from None
