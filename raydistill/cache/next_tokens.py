"""The teacher cache of a language model as a whole: which codec, what a shard is written from and read as.

What the cache holds of each codec, by its name in language_codecs:

    sampled, random, topk   sparse targets: sparse_shards, with ids in the data's alphabet
    hidden                  the last hidden state: hidden_shards, with the output head once, in head.parquet
    dense                   every logit in float16, as a feature of the vocabulary's width: feature_shards

A shard has a row for each row of its data shard, and of a row the positions whose next token is learnt from. With
text_logprobs another one stands by it, as text-NAME, of what the teacher gives to these tokens (text_logprobs).

Shapes: R rows, N positions, V vocabulary, D width of hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from raydistill.cache.alphabet import Alphabet
from raydistill.cache.feature_shards import FeatureColumn, FeatureShard, FeatureWriter, Int64, read_features
from raydistill.cache.hidden_shards import HIDDEN, hidden_writer, read_head, read_hidden
from raydistill.cache.sparse_rows import SparseFormat
from raydistill.cache.sparse_shards import SparseShard, read_sparse
from raydistill.errors import UserError
from raydistill.record.commit import Entry, Manifest
from raydistill.record.store import Store
from raydistill.targets import HiddenTargets, OutputHead, SparseTargets

HEAD = "head.parquet"
ALPHABET = "alphabet.parquet"
DENSE = "logits"
DENSE_CODEC = "float16"
WHOLE = ("hidden", "dense")
Targets = SparseTargets | HiddenTargets | torch.Tensor


def format_facts(form: SparseFormat | None) -> dict[str, Any]:
    """A sparse format as facts of a cache; of a codec that keeps all there is none."""
    return {} if form is None else {"format": asdict(form)}


def whole_writer(store: Store, name: str, codec: str, width: int) -> FeatureWriter:
    """Takes batches of `column_of(codec)`, (R, longest row, width), and commits them as one shard."""
    if codec == "hidden":
        return hidden_writer(store, name, width)
    return FeatureWriter(store, name, [FeatureColumn(DENSE, "LW", width)], DENSE_CODEC)


def column_of(codec: str) -> str:
    """The column of a codec that keeps all."""
    return HIDDEN if codec == "hidden" else DENSE


@dataclass(frozen=True)
class NextTokenShard:
    """The decoded access to one shard, in the order of its data shard's rows."""

    kept: SparseShard | FeatureShard
    column: str
    head: OutputHead | None

    @property
    def nbytes(self) -> int:
        return self.kept.nbytes

    def targets(self, rows_R: Int64) -> Targets:
        """Of these rows, by their index in the shard: the positions of the first, then of the second, and so on."""
        if isinstance(self.kept, SparseShard):
            return self.kept.targets(rows_R)
        parts = [torch.from_numpy(self.kept.row(self.column, int(row)).copy()) for row in rows_R]
        values = torch.cat(parts).view(self.kept.dtype)
        return HiddenTargets(values, self.head) if self.head is not None else values.float()


@dataclass(frozen=True)
class NextTokenCache:
    """A complete cache: where it stands, and what all its shards share."""

    store: Store
    folder: str
    manifest: Manifest
    alphabet: Alphabet | None
    head: OutputHead | None

    @classmethod
    def open(
        cls, store: Store, folder: str, manifest: Manifest, data: Manifest, *, data_store: Store | None = None
    ) -> NextTokenCache:
        """The cache of these data, which stand in the same store unless another is given.

        Raises UserError when a file is not what a manifest says.
        """
        facts, alphabet, head = manifest.facts, None, None
        if facts["codec"] not in WHOLE:
            alphabet = Alphabet.read(data_store or store, "data", named(data, ALPHABET))
        if facts["codec"] == "hidden":
            head = read_head(
                store, folder, named(manifest, HEAD), scale=facts["head_scale"], softcap=facts["head_softcap"]
            )
        return cls(store, folder, manifest, alphabet, head)

    @property
    def codec(self) -> str:
        return self.manifest.facts["codec"]

    def shard(self, entry: Entry, *, row_ids_R: Int64, positions_R: Int64) -> NextTokenShard:
        """The shard of a data shard, whose rows and numbers of positions are given. Raises UserError for another's."""
        facts = self.manifest.facts
        if self.codec == "hidden":
            kept: SparseShard | FeatureShard = read_hidden(
                self.store, self.folder, entry, self.manifest, row_ids_R=row_ids_R, tokens_R=positions_R
            )
        elif self.codec == "dense":
            columns = [{"name": DENSE, "axes": "LW", "size": facts["vocabulary"]}]
            manifest = replace(self.manifest, facts={"codec": DENSE_CODEC, "features": columns})
            kept = read_features(
                self.store, self.folder, entry, manifest, row_ids_N=row_ids_R, tokens_N=positions_R, names={DENSE}
            )
        else:
            assert self.alphabet is not None
            kept = read_sparse(self.store, self.folder, entry, SparseFormat(**facts["format"]), self.alphabet)
            if not np.array_equal(kept.row_ids_R, row_ids_R) or not np.array_equal(kept.tokens_R, positions_R):
                where = self.store.where(f"{self.folder}/{entry.file}")
                raise UserError(f"{where}: holds other rows than its data shard. Score again with --redo teach")
        return NextTokenShard(kept, column_of(self.codec), self.head)

    def joined(self, parts: Sequence[Targets], order_N: torch.Tensor) -> Targets:
        """The targets of several shards one after the other, then in this order."""
        if isinstance(parts[0], SparseTargets):
            return SparseTargets.joined([p for p in parts if isinstance(p, SparseTargets)]).select(order_N)
        if isinstance(parts[0], HiddenTargets):
            hidden_ND = torch.cat([p.hidden_ND for p in parts if isinstance(p, HiddenTargets)])
            return HiddenTargets(hidden_ND[order_N], parts[0].head)
        return torch.cat([p for p in parts if isinstance(p, torch.Tensor)])[order_N]


def named(manifest: Manifest, file: str) -> Entry:
    """The entry of a file that a manifest must have."""
    return next(entry for entry in manifest.files if entry.file == file)
