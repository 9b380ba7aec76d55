"""Points of a search space: one drawn at random, the grid of levels, and what a point is called.

Settings are taken in the order of their names, so that the order in which a config names them changes nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from raydistill.config.tune import Dimension
from raydistill.record.fingerprint import digest

Space = Mapping[str, Dimension]
Point = dict[str, Any]
DIGITS = 6  # of drawn numbers, so that every machine draws the same and configs are readable


def draw(space: Space, rng: np.random.Generator) -> Point:
    """One point at random."""
    return {name: _draw(space[name], rng) for name in sorted(space)}


def _draw(dimension: Dimension, rng: np.random.Generator) -> Any:
    if dimension.values is not None:
        return dimension.values[int(rng.integers(len(dimension.values)))]
    low, high = dimension.ends
    if dimension.integer is not None:
        return int(rng.integers(int(low), int(high) + 1))
    if dimension.loguniform is not None:
        return rounded(math.exp(rng.uniform(math.log(low), math.log(high))), low, high)
    return rounded(rng.uniform(low, high), low, high)


def rounded(value: float, low: float, high: float) -> float:
    """To a few digits, within the range."""
    return min(max(float(f"{value:.{DIGITS}g}"), low), high)


def grid(space: Space) -> Iterator[Point]:
    """Every combination of levels; the setting whose name comes last changes first."""
    return _combinations({name: space[name].levels() for name in sorted(space)})


def every_point(space: Space) -> Iterator[Point]:
    """All points of a space that has no range of real numbers."""

    def values(dimension: Dimension) -> tuple[Any, ...]:
        if dimension.integer is not None:
            return tuple(range(dimension.integer[0], dimension.integer[1] + 1))
        assert dimension.values is not None
        return dimension.values

    return _combinations({name: values(space[name]) for name in sorted(space)})


def _combinations(values: Mapping[str, tuple[Any, ...]]) -> Iterator[Point]:
    return (dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values()))


def point_id(point: Mapping[str, Any]) -> str:
    """What a point is called: the same for equal values."""
    return digest(dict(point))[:10]
