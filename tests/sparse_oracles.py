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


def inclusions(probs: list[float], widths: list[int]) -> np.ndarray:
    """pi_i = min(1, c p_i) with the sum `width`, a row for each width, by bisection on c; 1 where there are no more."""
    p, wanted = np.array(probs)[None], np.array(widths, float)[:, None]
    low, high = np.zeros_like(wanted), wanted / p[p > 0].min()
    for _ in range(120):
        middle = (low + high) / 2
        is_low = np.minimum(1, middle * p).sum(axis=1, keepdims=True) < wanted
        low, high = np.where(is_low, middle, low), np.where(is_low, high, middle)
    return np.where(wanted >= len(probs), 1.0, np.minimum(1, high * p))


def inclusion(probs: list[float], width: int) -> list[float]:
    """Of one width."""
    return inclusions(probs, [width])[0].tolist()


def needed(probs: list[float], width: int) -> int:
    """How many tokens: the number of least cost where a token costs 1 / width^2 and the summed variance its value."""
    if width >= len(probs):
        return len(probs)
    p, kept = np.array(probs), list(range(1, width + 2))
    used = p > 0
    variance = (p[used] ** 2 * (1 / inclusions(probs, kept)[:, used] - 1)).sum(axis=1)
    return kept[int(np.argmin(variance + np.array(kept) / width**2))]


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
