"""Whole rows packed beside each other into wider ones, so that next to nothing of a batch is padding.

The rows of a pack begin at position 0 each. From these positions transformers derives an attention that stays within a
row; padding, at the end of a pack, is position 0 throughout and so attends to itself alone.

Shapes: P packs, W tokens of the widest.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

PADDING = 0.05  # of a batch's tokens; attention's cost grows with the width, so that wider is taken for less than that
WIDEST = 4  # times the longest row
Packs = list[list[int]]


def packed(lengths: Sequence[int]) -> Packs:
    """The indices of rows of these lengths, pack by pack: as narrow as leaves PADDING or less, else the least padded.

    Rows are dealt to a number of packs, longest first, each to the pack that is emptiest (Graham 1969, the LPT rule).
    """
    total, longest = sum(lengths), max(lengths)
    fewest = max(1, -(-total // (WIDEST * longest)))
    best: tuple[float, Packs] | None = None
    for count in range(max(fewest, min(len(lengths), total // longest)), fewest - 1, -1):
        packs = dealt(lengths, count)
        width = max(sum(lengths[index] for index in pack) for pack in packs)
        padding = 1 - total / (width * count)
        if best is None or padding < best[0]:
            best = padding, packs
        if padding <= PADDING:
            break
    assert best is not None
    return best[1]


def dealt(lengths: Sequence[int], count: int) -> Packs:
    """The rows dealt to `count` packs whose sums are about even; packs may be empty where there are fewer rows."""
    packs: Packs = [[] for _ in range(count)]
    filled = [(0, number) for number in range(count)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        used, number = heapq.heappop(filled)
        packs[number].append(index)
        heapq.heappush(filled, (used + lengths[index], number))
    return packs


def pack_inputs(
    rows: Sequence[npt.NDArray[np.int32]], packs: Packs
) -> tuple[dict[str, torch.Tensor], npt.NDArray[np.int64]]:
    """input_ids_PW and position_ids_PW of the packs, and where each row begins in them laid end to end."""
    width = max(sum(len(rows[index]) for index in pack) for pack in packs)
    ids_PW, positions_PW = np.zeros((len(packs), width), np.int64), np.zeros((len(packs), width), np.int64)
    starts = np.zeros(len(rows), np.int64)
    for number, pack in enumerate(packs):
        place = 0
        for index in pack:
            cut = slice(place, place + len(rows[index]))
            ids_PW[number, cut], positions_PW[number, cut] = rows[index], np.arange(len(rows[index]))
            starts[index], place = number * width + place, cut.stop
    return {"input_ids": torch.from_numpy(ids_PW), "position_ids": torch.from_numpy(positions_PW)}, starts
