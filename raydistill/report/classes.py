"""Class by class: precision, recall and F1 of each model, and the confusions that tell a student from its teacher.

Shapes: N rows, K classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from raydistill.report.metrics import Labels

SHOWN_CONFUSIONS = 20


def of_classes(predicted_N: Labels, labels_N: Labels, classes: int) -> list[dict[str, float]]:
    """Precision, recall and F1 of each class; 0 where there is nothing to divide by."""
    hits = np.bincount(labels_N[predicted_N == labels_N], minlength=classes)
    return _rates(hits, np.bincount(predicted_N, minlength=classes), np.bincount(labels_N, minlength=classes))


def of_sets(predicted_NK: npt.NDArray[np.bool_], labels_NK: Labels) -> list[dict[str, float]]:
    """Precision, recall and F1 of each class, which is a question of its own for every row."""
    true_NK = labels_NK == 1
    return _rates((true_NK & predicted_NK).sum(axis=0), predicted_NK.sum(axis=0), true_NK.sum(axis=0))


def _rates(hits_K: Labels, predicted_K: Labels, true_K: Labels) -> list[dict[str, float]]:
    return [
        {
            "precision": float(hits / predicted) if predicted else 0.0,
            "recall": float(hits / true) if true else 0.0,
            "f1": float(2 * hits / (predicted + true)) if predicted + true else 0.0,
        }
        for hits, predicted, true in zip(hits_K, predicted_K, true_K, strict=True)
    ]


def confusions(labels_N: Labels, teacher_N: Labels, student_N: Labels, names: list[str]) -> list[dict[str, Any]]:
    """The pairs of label and wrong prediction whose counts differ most between student and teacher, the largest first.

    Pairs that differ by nothing are left out.
    """
    classes = len(names)

    def counts(predicted_N: Labels) -> npt.NDArray[np.int64]:
        return np.bincount(labels_N * classes + predicted_N, minlength=classes * classes).reshape(classes, classes)

    teacher_KK, student_KK = counts(teacher_N), counts(student_N)
    more_KK = student_KK - teacher_KK
    np.fill_diagonal(more_KK, 0)
    order = np.argsort(-np.abs(more_KK), axis=None, kind="stable")[:SHOWN_CONFUSIONS]
    pairs = [divmod(int(place), classes) for place in order if more_KK.flat[place]]
    return [
        {
            "label": names[label], "predicted": names[predicted], "rows": int((labels_N == label).sum()),
            "teacher": int(teacher_KK[label, predicted]), "student": int(student_KK[label, predicted]),
        }
        for label, predicted in pairs
    ]  # fmt: skip
