"""The order of a language model's rows in training, and which of them make a step: a function of (seed, epoch) alone.

Rows come in the order of `data/order.py`. A global batch is counted in tokens: an epoch of T tokens has S = T // B
steps for batches of B tokens (at least one), and a row belongs to the step in which its first token falls when the T
tokens are cut into S even stretches. So every epoch has the same number of steps, and none is without a row as long
as no row is longer than a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from raydistill.data.order import WINDOW_ROWS, window_order, windows

Int64 = npt.NDArray[np.int64]


def token_steps(tokens: int, batch_tokens: int) -> int:
    """Steps of an epoch over so many tokens."""
    return max(1, tokens // batch_tokens)


def token_batches(
    lengths: Sequence[Int64], *, seed: int, epoch: int, batch_tokens: int, first_step: int = 0,
    window_rows: int = WINDOW_ROWS,
) -> Iterator[tuple[Int64, list[int]]]:  # fmt: skip
    """The steps of an epoch from one on: (shard, row) pairs, and the shards of this window and the next.

    `lengths` are the tokens of every shard's rows, none more than batch_tokens. Windows before the first step are
    skipped without being built.
    """
    shard_rows, shard_tokens = [len(part) for part in lengths], [int(part.sum()) for part in lengths]
    total = sum(shard_tokens)
    steps = token_steps(total, batch_tokens)
    plan = windows(shard_rows, seed=seed, epoch=epoch, window_rows=window_rows)
    held, numbers = np.empty((0, 2), np.int64), np.empty(0, np.int64)
    start = 0
    for number, window in enumerate(plan):
        end = start + sum(shard_tokens[shard] for shard in window)
        if (end - 1) * steps // total < first_step:
            start = end
            continue
        order = window_order(shard_rows, window, seed=seed, epoch=epoch, number=number)
        sizes = np.array([lengths[shard][row] for shard, row in order.tolist()], np.int64)
        begins = start + np.cumsum(sizes) - sizes
        held = np.concatenate([held, order])
        numbers = np.concatenate([numbers, begins * steps // total])
        start = end
        needed = [shard for shards in plan[number : number + 2] for shard in shards]
        last = steps if number + 1 == len(plan) else int(numbers[-1])  # that step may go on in the next window
        for step in range(max(first_step, int(numbers[0])), last):
            yield held[numbers == step], needed
        held, numbers = held[numbers >= last], numbers[numbers >= last]
