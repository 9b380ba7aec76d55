"""The order of training rows: a function of (seed, epoch) alone, whatever the number of workers.

Shards are shuffled, taken in windows of about 32,768 rows, and the rows of a window are shuffled among each other, so
that a worker holds two windows of shards however large the data are. Asked to, the rows of about 50 batches are dealt
to them by length, so that fewer tokens are padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

WINDOW_ROWS = 32_768
POOL_BATCHES = 50


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


def grouped_by_length(
    order: npt.NDArray[np.int64], lengths_N: npt.NDArray[np.integer], *, batch_size: int, first: int, seed: list[int]
) -> npt.NDArray[np.int64]:
    """The (shard, row) pairs of a window in another order: a batch has rows of about the same length.

    The rows of every 50 batches, a random share of the window, are sorted by length and cut into batches, whose order
    is mixed. `lengths_N` are the rows' tokens, in the order of the pairs. The first `first` rows, which complete a
    batch of the window before, and the last ones, which fill none, stay as they are.
    """
    rng, pool = np.random.default_rng(seed), POOL_BATCHES * batch_size
    end = first + max(0, len(order) - first) // batch_size * batch_size
    parts = [order[:first]]
    for start in range(first, end, pool):
        rows, lengths = order[start : min(start + pool, end)], lengths_N[start : min(start + pool, end)]
        batches = rows[np.argsort(lengths, kind="stable")].reshape(-1, batch_size, 2)
        parts.append(rng.permutation(batches).reshape(-1, 2))
    return np.concatenate([*parts, order[max(first, end) :]])


def epoch_batches(
    shard_rows: list[int],
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    first_step: int = 0,
    window_rows: int = WINDOW_ROWS,
    lengths: Callable[[int], npt.NDArray[np.integer]] | None = None,
) -> Iterator[tuple[npt.NDArray[np.int64], list[int]]]:
    """The global batches of an epoch from a step on: (shard, row) pairs, and the shards of this window and the next.

    The last batch of an epoch holds what is left. Windows before the first step are skipped without being built.
    `lengths` gives the tokens of a shard's rows when batches are to have rows of about the same length.
    """
    plan = windows(shard_rows, seed=seed, epoch=epoch, window_rows=window_rows)
    skip, before = first_step * batch_size, 0
    held, needed = np.empty((0, 2), np.int64), plan[-1]
    for number, window in enumerate(plan):
        rows = sum(shard_rows[s] for s in window)
        before += rows
        if skip >= rows:
            skip -= rows
            continue
        order = window_order(shard_rows, window, seed=seed, epoch=epoch, number=number)
        if lengths is not None:
            of_shard = {shard: lengths(shard) for shard in window}
            lengths_N = np.array([of_shard[shard][row] for shard, row in order.tolist()])
            first = min(rows, -(before - rows) % batch_size)
            order = grouped_by_length(
                order, lengths_N, batch_size=batch_size, first=first, seed=[seed, epoch, number + 1, 1]
            )
        order, skip = order[skip:], 0
        needed = [shard for shards in plan[number : number + 2] for shard in shards]
        held = np.concatenate([held, order])
        while len(held) >= batch_size:
            yield held[:batch_size], needed
            held = held[batch_size:]
    if len(held):
        yield held, needed
