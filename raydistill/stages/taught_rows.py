"""The rows of splits with what the teacher says of them: data shards joined to the cache's by row id."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from raydistill.cache.shards import read_logits
from raydistill.data.loader import pair_entries
from raydistill.data.shards import DataShard, read_shard
from raydistill.errors import UserError
from raydistill.record.run import Run


def taught_shards(run: Run, splits: tuple[str, ...]) -> Iterator[tuple[DataShard, npt.NDArray[np.float32]]]:
    """The data shards of these splits, each with the teacher's cached logits of its rows, float32 (N, K).

    Raises UserError where a shard of the cache holds other rows.
    """
    data, cache, store = run.require("data"), run.require("cache"), run.home("data")
    entries = data.shards(*splits)
    for entry, cached in zip(entries, pair_entries(entries, cache.shards(*splits)), strict=True):
        shard, logits = read_shard(store, entry), read_logits(run.home("cache"), "teacher/cache", cached, cache)
        if not np.array_equal(shard.row_ids_N, logits.row_ids_N):
            where = run.home("cache").where(f"teacher/cache/{cached.file}")
            raise UserError(f"{where}: holds other rows than its data shard. Score again with --redo teach")
        yield shard, logits.logits_NK
