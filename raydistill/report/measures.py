"""Which measures a task has: of rows with one label, or with sets of labels.

Shapes: N rows, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raydistill.report.label_sets import (
    binary_nll,
    compare_label_sets,
    label_set_metrics,
    mean_binary_kl,
    same_sets,
)
from raydistill.report.metrics import Comparison, Floats, Labels, classifier_metrics, compare, mean_kl, nll


@dataclass(frozen=True)
class Measures:
    """metrics take logits, labels and the fitted temperature; same says in which rows two models predict the same."""

    metrics: Callable[[Floats, Labels, float], dict[str, float]]
    nll: Callable[[Floats, Labels], float]
    kl: Callable[[Floats, Floats], float]
    same: Callable[[Floats, Floats], npt.NDArray[np.bool_]]
    compare: Callable[..., Comparison]


def _same_classes(one_NK: Floats, other_NK: Floats) -> npt.NDArray[np.bool_]:
    return one_NK.argmax(axis=1) == other_NK.argmax(axis=1)


def _compare_classes(labels_N: Labels, logits: dict[str, Floats], *, resamples: int, seed: int) -> Comparison:
    right = {name: values.argmax(axis=1) == labels_N for name, values in logits.items()}
    return compare(right["teacher"], right["student"], right.get("control"), resamples=resamples, seed=seed)


OF_CLASSES = Measures(classifier_metrics, nll, mean_kl, _same_classes, _compare_classes)
OF_SETS = Measures(label_set_metrics, binary_nll, mean_binary_kl, same_sets, compare_label_sets)


def measures_of(labels: Labels) -> Measures:
    """The measures for labels that are classes, (N,), or sets of them, (N, K)."""
    return OF_SETS if labels.ndim > 1 else OF_CLASSES
