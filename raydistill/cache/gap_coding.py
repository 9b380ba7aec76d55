"""Whole numbers in two parts: a class, one byte that an entropy coder makes small, and the bits that the class leaves.

Numbers below 8 are classes of their own. Above, a class is a quarter of an octave [2^e, 2^(e + 1)), and the e - 2 bits
that say where in it are packed as they are: within a quarter of an octave a smooth distribution is nearly flat, so
that a coder would gain little from them (exponential Golomb codes, Teuhola 1978, with a suffix of two bits in the
class). Numbers go to 2^20 - 1, which takes 76 classes.

Bits are packed from the lowest up in little-endian words of 32; each row begins at a word.

Shapes: M numbers, R rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LARGEST = (1 << 20) - 1
WORD = 32
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]
UInt32 = npt.NDArray[np.uint32]

_OCTAVES = range(3, 20)
_BASES = np.array([*range(8), *((4 + quarter) << (e - 2) for e in _OCTAVES for quarter in range(4))], np.int64)
_WIDTHS = np.array([0] * 8 + [e - 2 for e in _OCTAVES for _ in range(4)], np.int64)


def split(values: Int64) -> tuple[UInt8, Int64]:
    """Every number's class, and what it is above the first number of its class."""
    classes = np.searchsorted(_BASES, values, side="right") - 1
    return classes.astype(np.uint8), values - _BASES[classes]


def bases(classes: UInt8) -> Int64:
    """The first number of every class."""
    return _BASES[classes]


def widths(classes: UInt8) -> Int64:
    """How many bits a class leaves."""
    return _WIDTHS[classes]


def places(widths_M: Int64, counts_R: Int64) -> tuple[Int64, Int64]:
    """Where every number's bits begin, counted from the first row's, and where every row's words begin, (R + 1).

    counts_R says how many numbers a row has.
    """
    ends_M = np.concatenate([np.zeros(1, np.int64), np.cumsum(widths_M)])
    borders_R1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts_R)])
    row_starts_R = ends_M[borders_R1[:-1]]
    words_R = -(-(ends_M[borders_R1[1:]] - row_starts_R) // WORD)
    words_R1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(words_R)])
    return ends_M[:-1] + np.repeat(WORD * words_R1[:-1] - row_starts_R, counts_R), words_R1


def pack(extras_M: Int64, widths_M: Int64, starts_M: Int64, words: int) -> UInt32:
    """The words with every number's bits at its place."""
    used = np.flatnonzero(widths_M)
    word, shift = np.divmod(starts_M[used], WORD)
    placed = extras_M[used].astype(np.uint64) << shift.astype(np.uint64)
    packed = np.zeros(words + 1, np.uint64)
    if len(used):
        firsts = np.flatnonzero(np.diff(word, prepend=-1))
        packed[word[firsts]] = np.add.reduceat(placed, firsts)  # bits that do not overlap: a sum is an or
    packed[1:] += packed[:-1] >> np.uint64(WORD)
    return packed[:words].astype("<u4")


def unpack(packed: UInt32, widths_M: Int64, starts_M: Int64) -> Int64:
    """Every number above the first of its class."""
    word, shift = np.divmod(starts_M, WORD)
    padded = np.concatenate([packed, np.zeros(2, np.uint32)]).astype(np.uint64)
    both = padded[word] | padded[word + 1] << np.uint64(WORD)
    return ((both >> shift.astype(np.uint64)) & ((np.uint64(1) << widths_M.astype(np.uint64)) - np.uint64(1))).astype(
        np.int64
    )
