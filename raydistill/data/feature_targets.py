"""The teacher's features of a batch from its cache: rows of several mapped shards, padded with the batch.

Shapes: N rows, L tokens of the longest row of the batch, W width, A attention heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from raydistill.cache.feature_shards import FeatureShard
from raydistill.losses.cached_features import names_of_term, serving
from raydistill.losses.feature_objective import FeatureTerm
from raydistill.record.commit import Manifest, read_manifest
from raydistill.record.store import Store

FOLDER = "teacher/features"


@dataclass(frozen=True)
class CachedFeatures:
    """A committed cache of features, and which of them each term takes for each of its pairs of layers."""

    manifest: Manifest
    terms: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> set[str]:
        return {name for term in self.terms for name in term}

    def batch(self, rows: Sequence[tuple[FeatureShard, int]], longest: int) -> tuple[tuple[torch.Tensor, ...], ...]:
        """What each term compares, by term and pair, in the cache's dtype; padding holds zeros.

        rows: each row's shard and its number in it.
        """
        padded = {name: _padded(name, rows, longest) for name in self.names}
        return tuple(tuple(padded[name] for name in term) for term in self.terms)


def cached_features(store: Store, terms: Sequence[FeatureTerm]) -> CachedFeatures | None:
    """The committed features of a run for these terms; None where there are no terms."""
    if not terms:
        return None
    manifest = read_manifest(store, FOLDER)
    assert manifest is not None
    kept = {feature["name"] for feature in manifest.facts["features"]}
    return CachedFeatures(manifest, tuple(tuple(_served(name, kept) for name in names_of_term(t)) for t in terms))


def _served(name: str, kept: set[str]) -> str:
    found = serving(name, kept)
    assert found is not None, f"{name} is not in the cache, which was not found before the workers started"
    return found


def _padded(name: str, rows: Sequence[tuple[FeatureShard, int]], longest: int) -> torch.Tensor:
    first = rows[0][0]
    batch = np.zeros((len(rows), *first.columns[name].shape(longest)), np.int16)
    for target, (shard, index) in zip(batch, rows, strict=True):
        values = shard.row(name, index)
        target[tuple(slice(length) for length in values.shape)] = values
    return torch.from_numpy(batch).view(first.dtype)
