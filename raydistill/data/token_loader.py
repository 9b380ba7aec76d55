"""A worker's batches of a language model: packed rows, the tokens to learn, and what the teacher says of them.

Shapes: N positions that are learnt from, R rows, P packs of W tokens, D width of hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from raydistill.cache.next_tokens import NextTokenCache, NextTokenShard
from raydistill.data.folds import FoldRows
from raydistill.data.held_shards import HeldShards
from raydistill.data.loader import pair_entries
from raydistill.data.packing import dealt, pack_inputs, packed
from raydistill.data.token_order import token_batches, token_steps
from raydistill.data.token_shards import TokenShard, read_token_shard
from raydistill.errors import UserError
from raydistill.losses.token_objective import CrossTeacher, Teacher
from raydistill.record.commit import Entry, Manifest
from raydistill.record.store import Store

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenBatch:
    """The rows of one micro-batch, packed. N counts positions that are learnt from, in the order of rows.

    inputs: input_ids_PW and position_ids_PW. places_N are those positions in the packs laid end to end, labels_N the
    tokens that follow them. rows_N numbers each position's row among `places` (shard, row). rows is N: what a loss is
    divided by; a rank without rows gets one of them and N = 0.
    """

    inputs: dict[str, torch.Tensor]
    places_N: torch.Tensor
    labels_N: torch.Tensor
    teacher: Teacher | CrossTeacher | None
    rows: int
    rows_N: torch.Tensor


@dataclass(frozen=True)
class Held:
    """A shard as training needs it: rows_R are those that are chosen, by their places in it."""

    tokens: TokenShard
    teacher: NextTokenShard | None
    rows_R: Int64

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + (self.teacher.nbytes if self.teacher else 0)


class TokenSplit:
    """One split of a language model's data, or chosen rows of it, with its share of the teacher's cache."""

    def __init__(
        self, store: Store, splits: tuple[str, ...], data: Manifest, cache: NextTokenCache | None,
        rows: FoldRows | None = None,
    ) -> None:  # fmt: skip
        self._store, self._cache = store, cache
        self._chosen = None if rows is None else rows.open()
        self.entries = data.shards(*splits)
        self._kept = pair_entries(self.entries, cache.manifest.shards(*splits)) if cache else None
        self._lengths: list[Int64] = []
        self._learnt: list[Int64] = []
        for entry in self.entries:  # of a shard that is not needed yet, these alone are kept
            shard = self._read(entry)
            chosen_R = self._rows(shard)
            self._lengths.append(shard.lengths_R[chosen_R])
            self._learnt.append(shard.learnt_R[chosen_R])
        self.rows = int(sum(part.sum() for part in self._learnt))  # of what a loss is a mean: positions
        self.tokens = int(sum(part.sum() for part in self._lengths))
        self._held = HeldShards(self._load)

    def _read(self, entry: Entry) -> TokenShard:
        """The rows of a data shard, as the model that learns has them."""
        return read_token_shard(self._store, entry)

    def _rows(self, shard: TokenShard) -> Int64:
        """The rows of a shard that are chosen, by their places in it."""
        if self._chosen is None:
            return np.arange(len(shard))
        return np.flatnonzero(self._chosen.chosen(shard.name, shard.row_ids_R))

    @property
    def has_teacher(self) -> bool:
        """Whether batches carry what the teacher says."""
        return self._cache is not None

    def steps(self, batch_tokens: int) -> int:
        """Optimiser steps of an epoch."""
        return token_steps(self.tokens, batch_tokens)

    def _load(self, number: int) -> Held:
        tokens = read_token_shard(self._store, self.entries[number])
        if self._cache is None or self._kept is None:
            return Held(tokens, None, self._rows(tokens))
        entry = self._kept[number]
        teacher = self._cache.shard(entry, row_ids_R=tokens.row_ids_R, positions_R=tokens.learnt_R)
        return Held(tokens, teacher, self._rows(tokens))

    def batch(self, places: Int64, *, counts: bool = True) -> TokenBatch:
        """The batch of these (shard, row) pairs; without `counts` none of their positions is learnt from."""
        shards = {int(number): self._held[int(number)] for number in np.unique(places[:, 0])}
        found = [(shards[shard].tokens, int(shards[shard].rows_R[row])) for shard, row in places.tolist()]
        rows = [tokens.row(row) for tokens, row in found]
        inputs, starts = pack_inputs(rows, packed([len(row) for row in rows]))
        positions = [tokens.positions(row) for tokens, row in found]
        if not counts:
            positions, places = [np.empty(0, np.int64)] * len(rows), places[:0]
        labels = [row[at + 1] for row, at in zip(rows, positions, strict=True)]
        where = [start + at for start, at in zip(starts, positions, strict=True)]
        return TokenBatch(
            inputs,
            torch.from_numpy(np.concatenate(where)),
            torch.from_numpy(np.concatenate(labels).astype(np.int64)),
            self._teacher(places) if self._cache and counts else None,
            sum(map(len, positions)),
            torch.from_numpy(np.repeat(np.arange(len(rows)), [len(at) for at in positions])),
        )

    def _teacher(self, places: Int64) -> Teacher | CrossTeacher:
        """What the teacher says at the positions of these rows, in their order."""
        return self._targets(places, self._learnt)

    def _targets(self, places: Int64, learnt: list[Int64]) -> Teacher:
        """What the cache holds of these rows, each of which has so many positions by its shard and place."""
        assert self._cache is not None
        parts, order = [], np.empty(len(places), np.int64)
        done, numbers = 0, [int(number) for number in np.unique(places[:, 0])]
        for number in numbers:
            mine, held = np.flatnonzero(places[:, 0] == number), self._held[number]
            assert held.teacher is not None
            parts.append(held.teacher.targets(held.rows_R[places[mine, 1]]))
            order[mine] = np.arange(done, done + len(mine))
            done += len(mine)
        counts = np.concatenate([learnt[n][places[places[:, 0] == n, 1]] for n in numbers])
        begins = np.cumsum(counts) - counts
        wanted = [np.arange(begins[place], begins[place] + counts[place]) for place in order]
        return self._cache.joined(parts, torch.from_numpy(np.concatenate(wanted)))

    def training_steps(
        self, *, seed: int, epoch: int, batch_tokens: int, first_step: int, rank: int, world: int, accumulation: int
    ) -> Iterator[tuple[int, Callable[[], Iterator[TokenBatch]]]]:
        """(global count of positions, this rank's micro-batches) of every step of an epoch from first_step on."""
        order = token_batches(self._lengths, seed=seed, epoch=epoch, batch_tokens=batch_tokens, first_step=first_step)
        for places, needed in order:
            self._held.need({*needed, *places[:, 0].tolist()})
            self._held.read_ahead(needed)
            learnt = sum(int(self._learnt[shard][row]) for shard, row in places.tolist())
            yield learnt, lambda places=places: self._micro_batches(places, rank, world, accumulation)

    def _micro_batches(self, places: Int64, rank: int, world: int, accumulation: int) -> Iterator[TokenBatch]:
        parts = dealt([int(self._lengths[shard][row]) for shard, row in places.tolist()], world * accumulation)
        for part in parts[rank * accumulation : (rank + 1) * accumulation]:
            yield self.batch(places[part]) if part else self.batch(places[:1], counts=False)

    def token_batches(self, tokens_per_batch: int) -> Iterator[TokenBatch]:
        """Every row once, in order, in batches of about so many tokens."""
        for number in range(len(self.entries)):
            ends = np.cumsum(self._lengths[number])
            for group in np.unique((ends - 1) // tokens_per_batch):
                rows = np.flatnonzero((ends - 1) // tokens_per_batch == group)
                yield self.batch(np.stack([np.full(len(rows), number), rows], axis=1))

    def close(self) -> None:
        self._held.close()


def check_vocabulary(needed: int, vocabulary: int, what: str) -> None:
    """Raises UserError for a model that lacks tokens of the tokenizer that its rows are made with."""
    if needed > vocabulary:
        raise UserError(
            f"{what}: knows {vocabulary} tokens, the data's tokenizer has {needed}. Use one that knows them all"
        )
