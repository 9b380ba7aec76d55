"""A share of the rows, even in every stratum, for trials that need not see them all.

Shapes: N rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def assign_share(strata_N: npt.NDArray[np.int64], share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which rows are in the share: a function of its arguments alone.

    The rows of each stratum are shuffled by (seed, stratum), the strata laid one after the other, and of that line
    every (1 / share)-th row is taken (systematic sampling), so that in all, and in every stratum within one row, it is
    the share exactly. The first row is in it, so that it is never empty.
    """
    line: list[npt.NDArray[np.int64]] = []
    for stratum in np.unique(strata_N):
        # numpy's seeds are not negative, and the label of a row without one is.
        rng = np.random.default_rng([seed, int(stratum) & 0xFFFFFFFF])
        line.append(rng.permutation(np.flatnonzero(strata_N == stratum)))
    order_N = np.concatenate(line)
    marks = np.ceil(np.arange(len(order_N) + 1) * share - 1e-9)
    chosen_N = np.zeros(len(strata_N), np.bool_)
    chosen_N[order_N] = np.diff(marks) > 0
    return chosen_N


def strata_of(labels: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """The stratum of every row: its label, or of rows with sets of labels a number for each set, (N, K) to (N,)."""
    if labels.ndim == 1:
        return labels.astype(np.int64)
    return np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
