"""Uniform numbers that are functions of (seed, row id, position, stream) and of nothing else.

No state: which worker draws, in which order, in what batch, changes nothing. Each is a hash of its key by the finaliser
of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 16), in 64-bit
integers that wrap around, so that every device gives the same bits.
"""

from __future__ import annotations

import torch

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB

# What a number is drawn for: two streams of a position never share bits.
TAIL_STREAM, DRAWS_STREAM, WEIGHTS_STREAM, ENTROPY_STREAM, WRITING_STREAM = range(5)


def uniforms(
    seed: int, row_ids_N: torch.Tensor, positions_N: torch.Tensor, *, stream: int, draws: int = 1
) -> torch.Tensor:
    """(N, draws) float64 in [0, 1), multiples of 2^-53; row ids and positions are int64."""
    start = torch.tensor(seed & ((1 << 62) - 1), dtype=torch.int64, device=row_ids_N.device)
    key_N = _mixed(_mixed(_mixed(_mixed(start) + stream) + row_ids_N) + positions_N)
    keys_ND = key_N[:, None] + torch.arange(draws, device=row_ids_N.device)
    return _shifted(_mixed(keys_ND), 11).double() * 2.0**-53


def _mixed(value: torch.Tensor) -> torch.Tensor:
    value = value + _GAMMA
    value = (value ^ _shifted(value, 30)) * _FIRST
    value = (value ^ _shifted(value, 27)) * _SECOND
    return value ^ _shifted(value, 31)


def _shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
    """The logical shift to the right; torch's keeps the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
