"""Which measures a task has: of rows with one label, or with sets of labels.

Shapes: N rows, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raydistill.report import classes, label_sets, metrics
from raydistill.report.metrics import Bin, Comparison, Floats, Labels


@dataclass(frozen=True)
class Measures:
    """metrics take logits, labels and the fitted temperature; same says in which rows two models predict the same."""

    metrics: Callable[[Floats, Labels, float], dict[str, float]]
    nll: Callable[[Floats, Labels], float]
    kl: Callable[[Floats, Floats], float]
    same: Callable[[Floats, Floats], npt.NDArray[np.bool_]]
    right: Callable[[Floats, Labels], npt.NDArray[np.bool_]]
    by_class: Callable[[Floats, Labels], list[dict[str, float]]]
    reliability: Callable[[Floats, Labels], list[Bin]]
    compare: Callable[..., Comparison]


def _same_classes(one_NK: Floats, other_NK: Floats) -> npt.NDArray[np.bool_]:
    return one_NK.argmax(axis=1) == other_NK.argmax(axis=1)


def _right_classes(logits_NK: Floats, labels_N: Labels) -> npt.NDArray[np.bool_]:
    return logits_NK.argmax(axis=1) == labels_N


def _by_class(logits_NK: Floats, labels_N: Labels) -> list[dict[str, float]]:
    return classes.of_classes(logits_NK.argmax(axis=1), labels_N, logits_NK.shape[1])


def _by_class_of_sets(logits_NK: Floats, labels_NK: Labels) -> list[dict[str, float]]:
    return classes.of_sets(logits_NK > 0, labels_NK)


def _compare_classes(labels_N: Labels, logits: dict[str, Floats], *, resamples: int, seed: int) -> Comparison:
    right = {name: _right_classes(values, labels_N) for name, values in logits.items()}
    return metrics.compare(right["teacher"], right["student"], right.get("control"), resamples=resamples, seed=seed)


OF_CLASSES = Measures(
    metrics.classifier_metrics, metrics.nll, metrics.mean_kl, _same_classes, _right_classes, _by_class,
    metrics.reliability, _compare_classes,
)  # fmt: skip
OF_SETS = Measures(
    label_sets.label_set_metrics, label_sets.binary_nll, label_sets.mean_binary_kl, label_sets.same_sets,
    label_sets.same_sets, _by_class_of_sets, label_sets.binary_reliability, label_sets.compare_label_sets,
)  # fmt: skip


def measures_of(labels: Labels) -> Measures:
    """The measures for labels that are classes, (N,), or sets of them, (N, K)."""
    return OF_SETS if labels.ndim > 1 else OF_CLASSES
