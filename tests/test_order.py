"""The order of training rows: every row once an epoch, from (seed, epoch) alone, and the same from any step on."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.data.order import POOL_BATCHES, epoch_batches, steps_per_epoch, window_order, windows

SHARDS = st.lists(st.integers(1, 40), min_size=1, max_size=12)
Pairs = list[tuple[int, int]]


def batches(
    shard_rows: list[int], *, seed: int = 0, epoch: int = 0, batch_size: int = 4, first_step: int = 0, window: int = 30
) -> list[Pairs]:
    order = epoch_batches(
        shard_rows, seed=seed, epoch=epoch, batch_size=batch_size, first_step=first_step, window_rows=window
    )
    return [[(int(shard), int(row)) for shard, row in places] for places, _ in order]


def all_rows(shard_rows: list[int]) -> Pairs:
    return [(shard, row) for shard, rows in enumerate(shard_rows) for row in range(rows)]


@given(SHARDS, st.integers(0, 99), st.integers(0, 5), st.integers(1, 50), st.integers(1, 60))
def test_each_row_comes_once_an_epoch(shard_rows: list[int], seed: int, epoch: int, batch_size: int, window: int):
    found = batches(shard_rows, seed=seed, epoch=epoch, batch_size=batch_size, window=window)
    assert sorted(pair for batch in found for pair in batch) == all_rows(shard_rows)
    assert len(found) == steps_per_epoch(sum(shard_rows), batch_size)
    assert all(len(batch) == batch_size for batch in found[:-1])
    assert 1 <= len(found[-1]) <= batch_size


@given(SHARDS, st.integers(0, 99), st.integers(1, 50), st.integers(1, 60), st.integers(0, 60))
def test_going_on_from_any_step_gives_the_batches_that_are_left(
    shard_rows: list[int], seed: int, batch_size: int, window: int, first_step: int
):
    whole = batches(shard_rows, seed=seed, batch_size=batch_size, window=window)
    rest = batches(shard_rows, seed=seed, batch_size=batch_size, window=window, first_step=first_step)
    assert rest == whole[first_step:]


def lengths_of(seed: int, shard: int) -> np.ndarray:
    return np.random.default_rng([seed, shard]).integers(1, 60, 40)


def grouped(shard_rows: list[int], *, seed: int, batch_size: int, window: int, first_step: int = 0) -> list[Pairs]:
    order = epoch_batches(
        shard_rows, seed=seed, epoch=0, batch_size=batch_size, first_step=first_step, window_rows=window,
        lengths=lambda shard: lengths_of(seed, shard),
    )  # fmt: skip
    return [[(int(shard), int(row)) for shard, row in places] for places, _ in order]


@given(SHARDS, st.integers(0, 99), st.integers(1, 50), st.integers(1, 60), st.integers(0, 60))
def test_grouped_by_length_each_row_comes_once_and_from_any_step_on(
    shard_rows: list[int], seed: int, batch_size: int, window: int, first_step: int
):
    whole = grouped(shard_rows, seed=seed, batch_size=batch_size, window=window)
    assert sorted(pair for batch in whole for pair in batch) == all_rows(shard_rows)
    assert [len(b) for b in whole] == [len(b) for b in batches(shard_rows, batch_size=batch_size)]
    rest = grouped(shard_rows, seed=seed, batch_size=batch_size, window=window, first_step=first_step)
    assert rest == whole[first_step:]


def test_grouped_by_length_batches_of_a_pool_do_not_overlap_and_come_in_random_order():
    shards, batch_size = [40] * 30, 8
    found = grouped(shards, seed=5, batch_size=batch_size, window=10**6)
    plain = batches(shards, seed=5, batch_size=batch_size, window=10**6)
    for start in range(0, 150, POOL_BATCHES):
        pool = [sorted(lengths_of(5, s)[r] for s, r in batch) for batch in found[start : start + POOL_BATCHES]]
        in_order = sorted(pool)
        assert all(one[-1] <= other[0] for one, other in itertools.pairwise(in_order))
        assert pool not in (in_order, in_order[::-1])
        rows = {pair for batch in plain[start : start + POOL_BATCHES] for pair in batch}
        assert rows == {pair for batch in found[start : start + POOL_BATCHES] for pair in batch}


def test_order_is_a_function_of_seed_and_epoch():
    shard_rows = [40, 13, 40, 7]
    assert batches(shard_rows, seed=3, epoch=2) == batches(shard_rows, seed=3, epoch=2)
    orders = [batches(shard_rows, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


@given(SHARDS, st.integers(1, 60))
def test_batch_size_cuts_one_order_and_does_not_change_it(shard_rows: list[int], batch_size: int):
    cut = [pair for batch in batches(shard_rows, batch_size=batch_size) for pair in batch]
    assert cut == [pair for batch in batches(shard_rows, batch_size=1) for pair in batch]


@given(SHARDS, st.integers(0, 99), st.integers(1, 60))
def test_windows_hold_each_shard_once_and_only_as_many_as_fill_them(shard_rows: list[int], seed: int, window: int):
    found = windows(shard_rows, seed=seed, epoch=1, window_rows=window)
    assert sorted(shard for shards in found for shard in shards) == list(range(len(shard_rows)))
    for shards in found[:-1]:
        assert sum(shard_rows[s] for s in shards) >= window
    for shards in found:
        assert sum(shard_rows[s] for s in shards[:-1]) < window


def test_shards_are_dealt_to_windows_anew_for_each_seed_and_epoch():
    plans = [windows([10] * 12, seed=seed, epoch=epoch, window_rows=30) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])


def test_rows_of_a_window_are_mixed_across_its_shards():
    mixed = window_order([100, 100, 100], [2, 0], seed=0, epoch=0, number=0)
    assert sorted(map(tuple, mixed.tolist())) == [(s, r) for s in (0, 2) for r in range(100)]
    changes = np.count_nonzero(np.diff(mixed[:, 0]))
    assert 70 < changes < 130  # 99.5 expected of a fair shuffle, standard deviation 7


def test_two_windows_of_one_epoch_are_not_mixed_the_same_way():
    first, second = (window_order([50, 50], [0], seed=0, epoch=0, number=n)[:, 1].tolist() for n in (0, 1))
    assert first != second


def test_each_batch_names_the_shards_of_its_window_and_of_the_next():
    # The loader keeps these in memory: when only the next window was named, shards of the current one could be dropped
    # and read again for every batch.
    shard_rows = [10] * 6
    plan = windows(shard_rows, seed=0, epoch=0, window_rows=20)
    assert [len(shards) for shards in plan] == [2, 2, 2]
    found = list(epoch_batches(shard_rows, seed=0, epoch=0, batch_size=8, window_rows=20))
    needed = [names for _, names in found]
    assert needed[0] == plan[0] + plan[1]
    assert needed[-1] == plan[2]
    for places, names in found[:2] + found[3:4]:
        assert set(places[:, 0].tolist()) <= set(names)


def test_unequal_shards_weigh_by_their_rows():
    # Over many epochs a row of a small shard is first as often as a row of a large one.
    first = [batches([1, 99], epoch=epoch, batch_size=1, window=1000)[0][0] for epoch in range(300)]
    assert sum(shard == 0 for shard, _ in first) <= 12  # 3 expected


@pytest.mark.parametrize(("rows", "batch_size", "steps"), [(8, 4, 2), (9, 4, 3), (1, 4, 1), (4, 1, 4)])
def test_steps_per_epoch_counts_the_last_short_batch(rows: int, batch_size: int, steps: int):
    assert steps_per_epoch(rows, batch_size) == steps
