"""What is measured of language models on a test set, and the paired intervals of their comparison.

Sums come row by row, certainty position by position; what is drawn again for the intervals are documents, because the
tokens of one are not independent (Efron and Tibshirani 1993, chapter 8).

Shapes: R rows, U documents, M models, S resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from raydistill.report.metrics import calibration_bins, mean_gap

Floats = npt.NDArray[np.floating]
BLOCK = 64  # resamples whose counts are held at once


def language_metrics(sums: Mapping[str, Floats], name: str) -> dict[str, float]:
    """perplexity, nll (nats a token), accuracy and ece of a model; of another than the teacher kl, agreement and top5.

    ece is the calibration error of the likeliest token over positions, in 15 bins of equal mass. Where models have
    tokens of their own, positions_NAME of them, perplexity and nll are a byte's, with bits_per_byte.
    """
    units = float(sums["positions"].sum())
    positions = float(sums.get(f"positions_{name}", sums["positions"]).sum())
    nll = float(sums[f"nll_{name}"].sum()) / units
    found = {
        "perplexity": math.exp(nll),
        "nll": nll,
        **({"bits_per_byte": nll / math.log(2)} if f"positions_{name}" in sums else {}),
        "accuracy": float(sums[f"accuracy_{name}"].sum()) / positions,
        "ece": mean_gap(calibration_bins(sums[f"confidence_{name}"], sums[f"right_{name}"] > 0)),
    }
    for column, metric in {"kl": "kl_to_teacher", "agreement": "agreement", "top5": "agreement_top5"}.items():
        if f"{column}_{name}" in sums:
            found[metric] = float(sums[f"{column}_{name}"].sum()) / positions
    return found


def reliability(sums: Mapping[str, Floats], name: str) -> list[dict[str, float]]:
    """The bins of `ece`: of each the likeliest token's mean probability, how often it was right, and the positions."""
    return [asdict(one) for one in calibration_bins(sums[f"confidence_{name}"], sums[f"right_{name}"] > 0)]


def compare_models(sums: Mapping[str, Floats], *, resamples: int, seed: int) -> dict[str, Any]:
    """Retention, gain and gap closed, with 95 % intervals, paired over documents.

    Retention is the teacher's perplexity over the student's. The gain is the control's perplexity less the student's.
    The gap is that between control and teacher in nats.
    """
    names = [name for name in ("teacher", "student", "control") if f"nll_{name}" in sums]
    measured, drawn, units = _over_documents(sums, names, resamples, seed)
    teacher, student = measured[:2]
    result: dict[str, Any] = {
        **_retention(measured, drawn),
        "gain_over_control": None, "gain_over_control_ci95": None, "gap_closed": None,
        "test_documents": units,
    }  # fmt: skip
    if "control" in names:
        control = measured[2]
        result["gain_over_control"] = math.exp(control) - math.exp(student)
        result["gain_over_control_ci95"] = _interval(np.exp(drawn[:, 2]) - np.exp(drawn[:, 1]))
        result["gap_closed"] = (control - student) / (control - teacher) if control > teacher else None
    return result


def retention(sums: Mapping[str, Floats], name: str, *, resamples: int, seed: int) -> dict[str, Any]:
    """What another model keeps of the teacher, with its interval, as `compare_models` says it of the student."""
    measured, drawn, _ = _over_documents(sums, ["teacher", name], resamples, seed)
    return _retention(measured, drawn)


def _over_documents(
    sums: Mapping[str, Floats], names: list[str], resamples: int, seed: int
) -> tuple[Floats, Floats, int]:
    """Nats a position of these models, (M,), and in every resample of the documents, (S, M); how many those are."""
    _, unit_R = np.unique(sums["document"], return_inverse=True)
    units = int(unit_R.max()) + 1
    columns = [sums["positions"], *(sums[f"nll_{name}"] for name in names)]
    of_units = np.stack([np.bincount(unit_R, column, units) for column in columns], axis=1)
    drawn = np.concatenate([_nll(counts @ of_units) for counts in _resamples(units, resamples, seed)])
    return _nll(of_units.sum(axis=0)[None])[0], drawn, units


def _retention(measured_M: Floats, drawn_SM: Floats) -> dict[str, Any]:
    """Of the second model, from the first one's nats and its own."""
    return {
        "retention": math.exp(measured_M[0] - measured_M[1]),
        "retention_ci95": _interval(np.exp(drawn_SM[:, 0] - drawn_SM[:, 1])),
    }


def of_training(sums: Mapping[str, Floats], student: str, control: str) -> dict[str, Any]:
    """What one training of the student reached, by the names of its models; None of a control that is not there."""
    found = language_metrics(sums, student)
    teacher = language_metrics(sums, "teacher")["perplexity"]
    beside = language_metrics(sums, control)["perplexity"] if f"nll_{control}" in sums else None
    return {
        "perplexity": found["perplexity"],
        "agreement": found.get("agreement"),
        "retention": teacher / found["perplexity"],
        "control": beside,
        "gain_over_control": None if beside is None else beside - found["perplexity"],
    }


def _resamples(units: int, resamples: int, seed: int) -> Any:
    """How often each document is drawn, a block of resamples at a time."""
    random = np.random.default_rng(seed)
    for start in range(0, resamples, BLOCK):
        yield random.multinomial(units, np.full(units, 1 / units), size=min(BLOCK, resamples - start))


def _nll(sums_SC: Floats) -> Floats:
    """Nats a position by model, from sums of positions and of each model's nats."""
    return sums_SC[:, 1:] / sums_SC[:, :1]


def _interval(values: Floats) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
