"""What the sparse codecs and losses must give, in plain Python and numpy from the formulas and from nothing else."""

from __future__ import annotations

import math

import numpy as np

MASK = (1 << 64) - 1


def splitmix(value: int) -> int:
    """The generator's step on a state: add the constant, then the finaliser."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def uniform(seed: int, row_id: int, position: int, stream: int, draw: int = 0) -> float:
    key = splitmix((splitmix((splitmix((splitmix(seed) + stream) & MASK) + row_id) & MASK) + position) & MASK)
    return (splitmix((key + draw) & MASK) >> 11) / (1 << 53)


def inclusion(probs: list[float], width: int) -> list[float]:
    """pi_i = min(1, c p_i) with the sum `width`, by bisection on c; 1 for every token where there are no more."""
    if width >= len(probs):
        return [1.0] * len(probs)
    low, high = 0.0, width / min(p for p in probs if p > 0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(min(1.0, middle * p) for p in probs) < width else (low, middle)
    return [min(1.0, high * p) for p in probs]


def needed(probs: list[float], width: int) -> int:
    """How many tokens: the number of least cost where a token costs 1 / width^2 and the summed variance its value."""
    if width >= len(probs):
        return len(probs)

    def cost(kept: int) -> float:
        pairs = zip(probs, inclusion(probs, kept), strict=True)
        return sum(p * p * (1 / pi - 1) for p, pi in pairs if p > 0) + kept / width**2

    return min(range(1, width + 2), key=cost)


def softmax(row: np.ndarray) -> np.ndarray:
    shifted = np.exp(row - row.max())
    return shifted / shifted.sum()


def systematic(probs: list[float], pi: list[float], offset: float) -> dict[int, float]:
    """Kept tokens with their weights: those at 1, and those whose stretch of the tail's mass holds a point of the comb.

    Laid out in units of the comb's spacing, so that token i is as long as pi_i and a point stands at offset + j.
    """
    kept, end = {}, 0.0
    for token, (p, share) in enumerate(zip(probs, pi, strict=True)):
        if share >= 1 - 1e-12:
            kept[token] = p
            continue
        begin, end = end, end + share
        if math.ceil(end - offset) > math.ceil(begin - offset):
            kept[token] = p / share
    return kept
