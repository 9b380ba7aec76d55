"""How well a model's own certainty tells rows of its task from rows of another.

Shapes: N rows, K classes.
"""

from __future__ import annotations

import numpy as np

from raydistill.report.metrics import Floats, log_softmax


def max_probability(logits_NK: Floats) -> Floats:
    """The probability of the likeliest class (Hendrycks and Gimpel 2017, arXiv:1610.02136, section 2)."""
    return np.exp(log_softmax(logits_NK)).max(axis=1)


def auroc(inside_N: Floats, outside_N: Floats) -> float:
    """Share of pairs of a row inside and one outside in which the inner one scores higher; ties count one half.

    The area under the ROC curve, by ranks (Mann-Whitney).
    """
    everything = np.concatenate([inside_N, outside_N])
    _, places, counts = np.unique(everything, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # the mean rank of equals, from 1
    inside = len(inside_N)
    rank_sum = ranks[places[:inside]].sum()
    return float((rank_sum - inside * (inside + 1) / 2) / (inside * len(outside_N)))
