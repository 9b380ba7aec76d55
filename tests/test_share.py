"""The share of rows that trials learn from."""

from __future__ import annotations

import numpy as np
import pytest

from raydistill.data.share import assign_share, strata_of

STRATA = np.random.default_rng(0).choice([-100, 0, 1, 2], p=[0.1, 0.6, 0.25, 0.05], size=997)


@pytest.mark.parametrize("share", [0.01, 0.2, 1 / 3, 0.5, 0.999, 1.0])
def test_it_is_the_share_in_all_and_in_every_stratum(share: float):
    chosen_N = assign_share(STRATA, share, seed=3)
    assert abs(chosen_N.sum() - share * len(STRATA)) < 1
    for stratum in np.unique(STRATA):
        rows_N = stratum == STRATA
        assert abs(chosen_N[rows_N].sum() - share * rows_N.sum()) <= 1


def test_it_follows_from_the_seed_alone_and_a_larger_share_is_larger():
    one = assign_share(STRATA, 0.2, seed=3)
    assert np.array_equal(one, assign_share(STRATA.copy(), 0.2, seed=3))
    assert not np.array_equal(one, assign_share(STRATA, 0.2, seed=4))
    assert assign_share(STRATA[:3], 0.01, seed=0).sum() == 1


def test_rows_of_a_stratum_are_equally_likely():
    counts = sum(assign_share(np.zeros(20, np.int64), 0.25, seed=seed).astype(int) for seed in range(800))
    # 800 draws of 5 in 20: each row 200 times, with a deviation of about 12.
    assert np.all(np.abs(counts - 200) < 60)


def test_sets_of_labels_are_strata_of_their_own():
    sets = np.array([[1, 0], [0, 1], [1, 0], [1, 1]], np.int8)
    assert strata_of(sets)[0] == strata_of(sets)[2]
    assert len(np.unique(strata_of(sets))) == 3
    assert strata_of(np.array([2, -100])).tolist() == [2, -100]
