"""What a test set can show: paired tests of two models, and the share of a teacher's quality that is proved kept.

Shapes: N rows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Rights = npt.NDArray[np.bool_]
NORMAL_95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def mcnemar(one_N: Rights, other_N: Rights) -> dict[str, Any]:
    """The rows that only one of two models has right, and the exact two-sided p-value of their difference.

    Under equal models each such row is a fair coin (McNemar 1947; exact by the binomial distribution).
    """
    only_one, only_other = int((one_N & ~other_N).sum()), int((other_N & ~one_N).sum())
    return {"only_one": only_one, "only_other": only_other, "p_value": fair_coin(only_one, only_other)}


def fair_coin(heads: int, tails: int) -> float:
    """Probability that a fair coin falls as unevenly as this, or more so, in as many throws."""
    throws, fewer = heads + tails, min(heads, tails)
    if 2 * fewer >= throws - 1:  # the two tails meet
        return 1.0
    logs = [math.lgamma(throws + 1) - math.lgamma(k + 1) - math.lgamma(throws - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(log - throws * math.log(2)) for log in logs))


def smallest_drop(one_N: Rights, other_N: Rights) -> float:
    """Half the 95 % interval of the difference of two accuracies: a drop below it cannot be told from none.

    By the normal approximation of the paired difference, as a share of 1.
    """
    difference_N = one_N.astype(np.float64) - other_N
    return float(NORMAL_95 * difference_N.std() / math.sqrt(len(one_N)))


def kept_share(asked: float, interval: tuple[float, float]) -> str:
    """Whether a retention is shown by its 95 % interval: `shown`, `refuted` where all of it lies below, `not shown`."""
    low, high = interval
    return "shown" if low >= asked else "refuted" if high < asked else "not shown"
