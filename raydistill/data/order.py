"""The order of training rows: a function of (seed, epoch) alone, whatever the number of workers.

Shards are shuffled, taken in windows of about 32,768 rows, and the rows of a window are shuffled among each other, so
that a worker holds two windows of shards however large the data are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

WINDOW_ROWS = 32_768


def steps_per_epoch(rows: int, batch_size: int) -> int:
    return -(-rows // batch_size)


def windows(shard_rows: list[int], *, seed: int, epoch: int, window_rows: int = WINDOW_ROWS) -> list[list[int]]:
    """The shards of every window of an epoch, in order."""
    result: list[list[int]] = []
    filled = window_rows
    for shard in np.random.default_rng([seed, epoch]).permutation(len(shard_rows)):
        if filled >= window_rows:
            result.append([])
            filled = 0
        result[-1].append(int(shard))
        filled += shard_rows[shard]
    return result


def window_order(
    shard_rows: list[int], window: list[int], *, seed: int, epoch: int, number: int
) -> npt.NDArray[np.int64]:
    """The shuffled rows of a window as (shard, row within it) pairs."""
    shards = np.repeat(window, [shard_rows[s] for s in window])
    rows = np.concatenate([np.arange(shard_rows[s]) for s in window])
    mixed = np.random.default_rng([seed, epoch, number + 1]).permutation(len(shards))
    return np.stack([shards, rows], axis=1)[mixed]


def epoch_batches(
    shard_rows: list[int],
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    first_step: int = 0,
    window_rows: int = WINDOW_ROWS,
) -> Iterator[tuple[npt.NDArray[np.int64], list[int]]]:
    """The global batches of an epoch from a step on: (shard, row) pairs, and the shards of this window and the next.

    The last batch of an epoch holds what is left. Windows before the first step are skipped without being built.
    """
    plan = windows(shard_rows, seed=seed, epoch=epoch, window_rows=window_rows)
    skip = first_step * batch_size
    held, needed = np.empty((0, 2), np.int64), plan[-1]
    for number, window in enumerate(plan):
        rows = sum(shard_rows[s] for s in window)
        if skip >= rows:
            skip -= rows
            continue
        order = window_order(shard_rows, window, seed=seed, epoch=epoch, number=number)[skip:]
        skip = 0
        needed = [shard for shards in plan[number : number + 2] for shard in shards]
        held = np.concatenate([held, order])
        while len(held) >= batch_size:
            yield held[:batch_size], needed
            held = held[batch_size:]
    if len(held):
        yield held, needed
