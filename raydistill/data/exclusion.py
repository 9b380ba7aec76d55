"""Which rows the student does not learn from the teacher: a rule over the teacher's outputs, labels and row ids.

It is applied wherever a shard of train is read, so that nothing of it is kept anywhere.

Shapes: N rows, K classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raydistill.data.labels import NO_LABEL


@dataclass(frozen=True)
class Exclusion:
    """The rule. A row that fits any part of it is excluded. Can be sent to a worker."""

    confidence_below: float | None = None
    wrong: bool = False
    classes: tuple[int, ...] = ()  # by their numbers in the data
    row_ids: frozenset[int] = frozenset()  # that were marked bad

    def reasons(
        self,
        row_ids_N: npt.NDArray[np.int64],
        labels: npt.NDArray[np.integer],
        logits_NK: npt.NDArray[np.float32],
    ) -> dict[str, npt.NDArray[np.bool_]]:
        """For each part of the rule the rows that fit it.

        labels are (N,), or (N, K) for sets of labels; of a row without one nothing is known, so that only the teacher's
        answer counts. logits_NK are the teacher's as the student learns from them, calibrated or not.
        """
        answers = _answers(logits_NK, is_sets=labels.ndim > 1)
        found: dict[str, npt.NDArray[np.bool_]] = {}
        if self.confidence_below is not None:
            found["confidence_below"] = confidence(logits_NK, is_sets=labels.ndim > 1) < self.confidence_below
        if self.wrong:
            found["wrong"] = is_wrong(logits_NK, labels)
        if self.classes:
            found["classes"] = self._of_classes(answers) | self._of_classes(labels)
        if self.row_ids:
            found["marked_bad"] = np.isin(row_ids_N, np.array(sorted(self.row_ids), np.int64))
        return found

    def excluded(
        self,
        row_ids_N: npt.NDArray[np.int64],
        labels: npt.NDArray[np.integer],
        logits_NK: npt.NDArray[np.float32],
    ) -> npt.NDArray[np.bool_]:
        """Which rows are excluded."""
        parts = list(self.reasons(row_ids_N, labels, logits_NK).values())
        return np.logical_or.reduce(parts) if parts else np.zeros(len(row_ids_N), np.bool_)

    def count(
        self, shards: Iterable[tuple[npt.NDArray[np.int64], npt.NDArray[np.integer], npt.NDArray[np.float32]]]
    ) -> dict[str, int]:
        """How many rows of these shards (row ids, labels, logits) are excluded in all ("rows"), and by each part."""
        found: Counter[str] = Counter({"rows": 0})
        for shard in shards:
            parts = self.reasons(*shard)
            found.update({name: int(mask.sum()) for name, mask in parts.items()})
            found["rows"] += int(self.excluded(*shard).sum())
        return dict(found)

    def _of_classes(self, answers: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        if answers.ndim > 1:
            return (answers[:, list(self.classes)] == 1).any(axis=1)
        return np.isin(answers, self.classes)


def confidence(logits_NK: npt.NDArray[np.float32], *, is_sets: bool) -> npt.NDArray[np.float64]:
    """The probability that a model gives its own answer; of a set of labels, as the product over classes."""
    logits = logits_NK.astype(np.float64)
    if is_sets:
        return np.exp(-np.logaddexp(0, -np.abs(logits)).sum(axis=1))
    return 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)


def is_wrong(logits_NK: npt.NDArray[np.float32], labels: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """In which rows a model's answer is not the label; of a row without a label that is not known, and not said."""
    answers = _answers(logits_NK, is_sets=labels.ndim > 1)
    if labels.ndim > 1:
        return ((answers != labels) & (labels != NO_LABEL)).any(axis=1)
    return (answers != labels) & (labels != NO_LABEL)


def _answers(logits_NK: npt.NDArray[np.float32], *, is_sets: bool) -> npt.NDArray[np.integer]:
    return (logits_NK > 0).astype(np.int8) if is_sets else logits_NK.argmax(axis=1)
