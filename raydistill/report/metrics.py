"""What is measured of a classifier's logits on a test set, and the paired intervals of its comparison with others.

Shapes: N rows, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BINS = 15
Floats = npt.NDArray[np.floating]
Labels = npt.NDArray[np.integer]


def log_softmax(logits_NK: Floats) -> Floats:
    shifted = logits_NK.astype(np.float64) - logits_NK.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def macro_f1(predicted_N: Labels, labels_N: Labels) -> float:
    """Mean F1 over the classes that are the label or the prediction of some row."""
    classes = int(max(predicted_N.max(), labels_N.max())) + 1
    hits_N = labels_N[predicted_N == labels_N]
    true, predicted, hits = (np.bincount(values, minlength=classes) for values in (labels_N, predicted_N, hits_N))
    present = true + predicted > 0
    return float((2 * hits[present] / (true + predicted)[present]).mean())


def nll(logits_NK: Floats, labels_N: Labels) -> float:
    """Mean of -log p(label) in nats."""
    return float(-log_softmax(logits_NK)[np.arange(len(labels_N)), labels_N].mean())


@dataclass(frozen=True)
class Bin:
    """Rows that are about as certain: their mean probability, how often they hold, and how many they are."""

    probability: float
    held: float
    rows: int


def calibration_bins(probability_N: Floats, held_N: npt.NDArray[np.bool_]) -> list[Bin]:
    """15 bins of equal mass by probability (Nguyen and O'Connor 2015, arXiv:1508.05154); fewer of fewer rows."""
    order = np.argsort(probability_N, kind="stable")
    bins = [b for b in np.array_split(order, BINS) if len(b)]
    return [Bin(float(probability_N[b].mean()), float(held_N[b].mean()), len(b)) for b in bins]


def mean_gap(bins: list[Bin]) -> float:
    """Expected calibration error: the mean over rows of |probability - how often it held|, bin by bin."""
    return sum(abs(one.probability - one.held) * one.rows for one in bins) / sum(one.rows for one in bins)


def reliability(logits_NK: Floats, labels_N: Labels) -> list[Bin]:
    """The bins of the likeliest class's probability, and how often it is right."""
    return calibration_bins(np.exp(log_softmax(logits_NK)).max(axis=1), logits_NK.argmax(axis=1) == labels_N)


def calibration_error(logits_NK: Floats, labels_N: Labels) -> float:
    """Expected calibration error of the likeliest class, in 15 bins of equal mass."""
    return mean_gap(reliability(logits_NK, labels_N))


def brier(logits_NK: Floats, labels_N: Labels) -> float:
    """Mean over rows of the squared distance, summed over classes, of the probabilities from the label (Brier 1950)."""
    errors_NK = np.exp(log_softmax(logits_NK))
    errors_NK[np.arange(len(labels_N)), labels_N] -= 1
    return float((errors_NK**2).sum(axis=1).mean())


def mean_kl(teacher_NK: Floats, student_NK: Floats) -> float:
    """Mean KL(teacher || student) in nats at temperature 1."""
    teacher, student = log_softmax(teacher_NK), log_softmax(student_NK)
    return float((np.exp(teacher) * (teacher - student)).sum(axis=1).mean())


def classifier_metrics(logits_NK: Floats, labels_N: Labels, temperature: float) -> dict[str, float]:
    """Accuracy, macro F1; NLL, Brier score and calibration error, also at the temperature fitted on validation."""
    predicted_N, scaled_NK = logits_NK.argmax(axis=1), logits_NK / temperature
    return {
        "accuracy": float((predicted_N == labels_N).mean()),
        "macro_f1": macro_f1(predicted_N, labels_N),
        "nll": nll(logits_NK, labels_N),
        "nll_scaled": nll(scaled_NK, labels_N),
        "brier": brier(logits_NK, labels_N),
        "brier_scaled": brier(scaled_NK, labels_N),
        "ece": calibration_error(logits_NK, labels_N),
        "ece_scaled": calibration_error(scaled_NK, labels_N),
        "temperature": temperature,
    }


@dataclass(frozen=True)
class Comparison:
    """A student beside its teacher and its control; intervals are 95 %, paired over test rows."""

    retention: float | None  # None for a teacher that is never right
    retention_ci95: tuple[float, float]
    gain_over_control: float | None
    gain_over_control_ci95: tuple[float, float] | None
    gap_closed: float | None
    gap_closed_ci95: tuple[float, float] | None  # None too where resamples put the control above the teacher


def compare(
    teacher_N: npt.NDArray[np.bool_],
    student_N: npt.NDArray[np.bool_],
    control_N: npt.NDArray[np.bool_] | None,
    *,
    resamples: int,
    seed: int,
) -> Comparison:
    """Retention, gain and gap closed from which rows each model has right.

    The bootstrap resamples rows and keeps each row's three outcomes together (Efron and Tibshirani 1993, chapter 13).
    There are eight outcomes, so a resample is one multinomial draw over their counts.
    """
    models = np.stack([teacher_N, student_N, teacher_N if control_N is None else control_N]).astype(np.int64)
    counts = np.bincount(models[0] * 4 + models[1] * 2 + models[2], minlength=8)
    right = np.array([[(cell >> 2) & 1, (cell >> 1) & 1, cell & 1] for cell in range(8)])
    rows = counts.sum()
    drawn = np.random.default_rng(seed).multinomial(rows, counts / rows, size=resamples) @ right / rows
    return compared((counts @ right) / rows, drawn, smallest=1 / rows, has_control=control_N is not None)


def compared(measured: Floats, drawn: Floats, *, smallest: float, has_control: bool) -> Comparison:
    """The comparison of teacher, student and control as measured, with intervals from the resamples (one row each).

    A teacher that a resample finds never right counts there as right in the smallest share there is.
    """
    teacher, student, control = measured
    retained = drawn[:, 1] / np.maximum(drawn[:, 0], smallest)
    gain, gap = drawn[:, 1] - drawn[:, 2], drawn[:, 0] - drawn[:, 2]
    has_gap = has_control and teacher > control
    return Comparison(
        retention=float(student / teacher) if teacher else None,
        retention_ci95=_interval(retained),
        gain_over_control=float(student - control) if has_control else None,
        gain_over_control_ci95=_interval(gain) if has_control else None,
        gap_closed=float((student - control) / (teacher - control)) if has_gap else None,
        gap_closed_ci95=_interval(gain / gap) if has_gap and (gap > 0).all() else None,
    )


def _interval(values: Floats) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
