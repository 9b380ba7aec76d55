"""What several trainings that differ in their seed alone show: a mean over them, and how far chance moves it.

The interval is over trainings, by Student's t distribution, on the test set as it is. What another test set would
say is in the intervals of the first training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SHARE = 0.95
Forms = Mapping[str, tuple[str, Callable[[float], str]]]  # of each figure its title and how it is told


def over_seeds(trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and 95 % interval of every figure that all trainings have, and their table.

    A training is its "seed" and its figures by name; None for one that it does not have.
    """
    names = [name for name in trainings[0] if name != "seed"]
    known = [name for name in names if all(training[name] is not None for training in trainings)]
    return {
        "trainings": [dict(training) for training in trainings],
        "mean": {name: mean_interval([training[name] for training in trainings]) for name in known},
    }


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """ "mean" and "ci95" of the mean of independent normal values with an unknown variance; two values at least."""
    count = len(values)
    mean = math.fsum(values) / count
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = t_quantile(count - 1) * deviation / math.sqrt(count)
    return {"mean": mean, "ci95": (mean - half, mean + half)}


def t_quantile(degrees: int) -> float:
    """The number that |t| with so many degrees of freedom stays below in 95 % of all cases."""
    low, high = 0.0, 20.0  # of one degree it is 12.7
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < SHARE else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """P(|t| < t), by the finite series for whole degrees (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def seeds_table(report: Mapping[str, Any], forms: Forms) -> list[list[str]]:
    """Header and rows: every training, the mean and its interval; empty for a report of one training."""
    found = report.get("seeds")
    if not found:
        return []
    shown = {name: form for name, form in forms.items() if name in found["mean"]}
    rows = [["seed", *(title for title, _ in shown.values())]]
    for training in found["trainings"]:
        rows.append([str(training["seed"]), *(told(training[name]) for name, (_, told) in shown.items())])
    means = [(found["mean"][name], told) for name, (_, told) in shown.items()]
    rows.append(["mean", *(told(one["mean"]) for one, told in means)])
    rows.append(["95 % interval", *(f"{told(one['ci95'][0])} to {told(one['ci95'][1])}" for one, told in means)])
    return rows


def seeds_verdict(report: Mapping[str, Any], forms: Forms) -> list[str]:
    """A sentence about the mean over seeds; none for a report of one training."""
    found = report.get("seeds")
    if not found:
        return []
    parts = []
    for name, (title, told) in forms.items():
        if one := found["mean"].get(name):
            parts.append(f"{title} {told(one['mean'])} ({told(one['ci95'][0])} to {told(one['ci95'][1])})")
    seeds = [str(training["seed"]) for training in found["trainings"]]
    return [
        f"Trained with {len(seeds)} seeds ({', '.join(seeds)}), mean and 95 % interval over them: {'; '.join(parts)}."
        f" The student that is kept is that of seed {seeds[0]}."
    ]
