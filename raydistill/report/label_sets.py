"""What is measured of logits where a row may have several labels or none: each class is a yes or no of its own.

A class is predicted where its logit is above 0, its probability above one half. Labels are 1 or 0.

Shapes: N rows, K classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from raydistill.report.metrics import Bin, Comparison, Floats, Labels, calibration_bins, compared, mean_gap


def binary_nll(logits_NK: Floats, labels_NK: Labels) -> float:
    """Mean over rows of -log p(the row's set of labels), in nats: the sum over classes."""
    signs_NK = np.where(labels_NK == 1, -1.0, 1.0)
    return float(np.logaddexp(0, signs_NK * logits_NK.astype(np.float64)).sum(axis=1).mean())


def mean_binary_kl(teacher_NK: Floats, student_NK: Floats) -> float:
    """Mean over rows of KL(teacher || student), summed over classes, in nats at temperature 1."""
    teacher, student = teacher_NK.astype(np.float64), student_NK.astype(np.float64)
    total = np.zeros(len(teacher))
    for sign in (1.0, -1.0):  # of yes, then of no
        log_first, log_second = -np.logaddexp(0, -sign * teacher), -np.logaddexp(0, -sign * student)
        total += (np.exp(log_first) * (log_first - log_second)).sum(axis=1)
    return float(total.mean())


def binary_reliability(logits_NK: Floats, labels_NK: Labels) -> list[Bin]:
    """The bins of every class's probability in every row, and how often the class is a label of its row."""
    return calibration_bins(_probability(logits_NK).ravel(), (labels_NK == 1).ravel())


def binary_calibration_error(logits_NK: Floats, labels_NK: Labels) -> float:
    """Expected calibration error over all rows and classes: the probability of a label against how often it holds."""
    return mean_gap(binary_reliability(logits_NK, labels_NK))


def binary_brier(logits_NK: Floats, labels_NK: Labels) -> float:
    """Mean over rows of the squared distance of the probabilities from the labels, summed over classes."""
    return float(((_probability(logits_NK) - (labels_NK == 1)) ** 2).sum(axis=1).mean())


def _probability(logits_NK: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -logits_NK.astype(np.float64)))


def same_sets(one_NK: Floats | Labels, other_NK: Floats | Labels) -> npt.NDArray[np.bool_]:
    """In which rows both predict, or have, the same labels."""
    return ((one_NK > 0) == (other_NK > 0)).all(axis=1)


def label_set_metrics(logits_NK: Floats, labels_NK: Labels, temperature: float) -> dict[str, float]:
    """Accuracy (of whole sets), F1; NLL, Brier score and calibration error, also at validation's temperature."""
    true_NK, predicted_NK, scaled_NK = labels_NK == 1, logits_NK > 0, logits_NK / temperature
    either = true_NK.sum(axis=0) + predicted_NK.sum(axis=0)
    hits = (true_NK & predicted_NK).sum(axis=0)
    present = either > 0
    return {
        "accuracy": float(same_sets(logits_NK, labels_NK).mean()),
        "micro_f1": float(2 * hits.sum() / max(1, either.sum())),
        "macro_f1": float((2 * hits[present] / either[present]).sum() / max(1, present.sum())),
        "nll": binary_nll(logits_NK, labels_NK),
        "nll_scaled": binary_nll(scaled_NK, labels_NK),
        "brier": binary_brier(logits_NK, labels_NK),
        "brier_scaled": binary_brier(scaled_NK, labels_NK),
        "ece": binary_calibration_error(logits_NK, labels_NK),
        "ece_scaled": binary_calibration_error(scaled_NK, labels_NK),
        "temperature": temperature,
    }


def compare_label_sets(labels_NK: Labels, logits: dict[str, Floats], *, resamples: int, seed: int) -> Comparison:
    """Retention, gain and gap closed in micro F1; the bootstrap resamples rows, with all models' answers to each.

    A row counts by its hits and by its labels and predictions together, so that rows that count alike are drawn as
    one: a resample is a multinomial draw over the kinds of rows.
    """
    true_NK = labels_NK == 1
    counts: list[npt.NDArray[np.int64]] = []
    for name in ("teacher", "student", "control"):
        predicted_NK = logits.get(name, logits["teacher"]) > 0
        counts.append(2 * (true_NK & predicted_NK).sum(axis=1))
        counts.append(true_NK.sum(axis=1) + predicted_NK.sum(axis=1))
    kinds, rows = np.unique(np.stack(counts, axis=1), axis=0, return_counts=True)

    def scores(drawn: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
        totals = drawn @ kinds
        return totals[..., 0::2] / np.maximum(totals[..., 1::2], 1)

    random, all_rows, chunk = np.random.default_rng(seed), int(rows.sum()), max(1, 4_000_000 // len(rows))
    drawn = np.concatenate(
        [
            scores(random.multinomial(all_rows, rows / all_rows, size=min(chunk, resamples - start)))
            for start in range(0, resamples, chunk)
        ]
    )
    return compared(scores(rows), drawn, smallest=1 / all_rows, has_control="control" in logits)
