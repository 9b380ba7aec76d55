"""Sparse next-token targets of rows as the numbers of Parquet's columns, and back. sparse_shards says what they are.

Shapes: R rows, N positions, K kept tokens, M kept tokens of all positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from raydistill.cache import gap_coding
from raydistill.cache.alphabet import Alphabet
from raydistill.cache.counter_random import ENTROPY_STREAM, WEIGHTS_STREAM, uniforms
from raydistill.cache.gap_coding import Int64, UInt8
from raydistill.targets import SparseTargets

COUNTED = 128  # beside the class of a gap: the token has a count of its own
ENTROPY_UNITS = 16  # of a nat; 255 of them are above the logarithm of any vocabulary
MOST_KEPT = 255
MOST_UNITS = 1 << 16
FINEST = 1 << 16  # counts that are whole numbers must not fall to the one before by float32's rounding
Float64 = npt.NDArray[np.float64]
Columns = dict[str, tuple[npt.NDArray[Any], Int64]]


@dataclass(frozen=True)
class SparseFormat:
    """What a shard's bytes follow from, beside its targets: the facts of a cache.

    kept: the most tokens of a position; for `random` the draws. units: what the counts of a position sum to. For
    `random` they are the draws again, and topk has no counts. probabilities: each kept token's own is stored, two
    bytes (topk always has them). seed: of the rounding of counts and entropies. Raises ValueError out of bounds.
    """

    codec: Literal["sampled", "random", "topk"]
    kept: int
    units: int = 64
    probabilities: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.kept <= MOST_KEPT:
            raise ValueError(f"a position keeps 1 to {MOST_KEPT} tokens, found {self.kept}")
        if not 1 <= self.units <= MOST_UNITS:
            raise ValueError(f"weights are counted in 1 to {MOST_UNITS} units, found {self.units}")
        if self.codec == "random" and self.units != self.kept:
            raise ValueError(f"random counts its {self.kept} draws, found {self.units} units")

    @property
    def columns(self) -> list[str]:
        """The binary columns."""
        gaps = [f"gap_{place:02d}" for place in range(self.kept)]
        own = ["log_tail"] if self.codec == "topk" else ["weights"]
        logprobs = ["logprobs"] if self.has_logprobs else []
        return ["kept", *gaps, *own, *logprobs, "bits", "entropy"]

    @property
    def has_logprobs(self) -> bool:
        return self.codec == "topk" or self.probabilities


def encode(
    row_ids_R: Int64, tokens_R: Int64, targets: SparseTargets, form: SparseFormat, alphabet: Alphabet
) -> dict[str, tuple[npt.NDArray[Any], Int64]]:
    """Every binary column's numbers and how many of them each row has."""
    rows_N = np.repeat(np.arange(len(tokens_R)), tokens_R)
    row_ids_N, positions_N = _places(row_ids_R, tokens_R)
    rank_NK, count_NK, half_NK, kept_N = _sorted(targets, row_ids_N, positions_N, form, alphabet)
    present_NK = np.arange(rank_NK.shape[1]) < kept_N[:, None]
    gap_class_M, gap_extra_M = gap_coding.split(np.diff(rank_NK, axis=1, prepend=0)[present_NK])
    counted_M = count_NK[present_NK] > 0
    count_class_M, count_extra_M = gap_coding.split(count_NK[present_NK])
    widths_2M = np.stack([gap_coding.widths(gap_class_M), gap_coding.widths(count_class_M)], axis=1).ravel()
    kept_R = np.bincount(rows_N, kept_N, len(tokens_R)).astype(np.int64)
    counted_R = np.bincount(rows_N, (count_NK > 0).sum(axis=1), len(tokens_R)).astype(np.int64)
    starts_2M, words_R1 = gap_coding.places(widths_2M, 2 * kept_R)
    extras_2M = np.stack([gap_extra_M, count_extra_M], axis=1).ravel()
    columns: dict[str, tuple[npt.NDArray[Any], Int64]] = {
        "kept": (kept_N.astype(np.uint8), tokens_R),
        "weights": (count_class_M[counted_M], counted_R),
        "bits": (gap_coding.pack(extras_2M, widths_2M, starts_2M, int(words_R1[-1])), np.diff(words_R1)),
        "logprobs": (half_NK[present_NK].astype("<u2"), kept_R),
        "entropy": (_entropy_units(targets, row_ids_N, positions_N, form), tokens_R),
    }
    if targets.log_tail_N is not None:
        columns["log_tail"] = (targets.log_tail_N.cpu().numpy().astype("<f4"), tokens_R)
    gap_class_NK = np.zeros(rank_NK.shape, np.uint8)
    gap_class_NK[present_NK] = gap_class_M + COUNTED * counted_M.astype(np.uint8)
    for after in range(form.kept):
        has_N = kept_N > after
        column_M = gap_class_NK[has_N, kept_N[has_N] - 1 - after]
        columns[f"gap_{after:02d}"] = (column_M, np.bincount(rows_N, has_N, len(tokens_R)).astype(np.int64))
    return columns


def _places(row_ids_R: Int64, tokens_R: Int64) -> tuple[torch.Tensor, torch.Tensor]:
    """Every position's row id, and its number within its row."""
    firsts_R = np.cumsum(tokens_R) - tokens_R
    within_N = np.arange(tokens_R.sum()) - np.repeat(firsts_R, tokens_R)
    return torch.from_numpy(np.repeat(row_ids_R, tokens_R)), torch.from_numpy(within_N)


def _sorted(
    targets: SparseTargets, row_ids_N: torch.Tensor, positions_N: torch.Tensor, form: SparseFormat, alphabet: Alphabet
) -> tuple[Int64, Int64, npt.NDArray[np.uint16], Int64]:
    """Kept tokens by rising rank: rank, count (0: from the tail), bits of the log-probability, how many there are.

    One sort of one integer a token that holds all three. Unused slots stand at the end and are 0.
    """
    weights_NK = targets.weights_NK.cpu().numpy().astype(np.float64)
    exact_NK = targets.exact_NK.cpu().numpy() | (form.codec == "random")  # whose counts are whole
    if form.codec == "topk":
        counts_NK, present_NK = np.zeros(weights_NK.shape, np.int64), weights_NK > 0
    else:
        uniform_N = uniforms(form.seed, row_ids_N, positions_N, stream=WEIGHTS_STREAM)[:, 0].numpy()
        counts_NK, present_NK = _counts(weights_NK, exact_NK, uniform_N, form.units)
    half_NK = np.zeros(weights_NK.shape, np.uint16)
    if form.has_logprobs:
        assert targets.probs_NK is not None
        half_NK = targets.probs_NK.log().cpu().numpy().astype("<f2").view(np.uint16)
    ranks_NK = alphabet.ranks_V[targets.ids_NK.cpu().numpy()].astype(np.int64)
    unused = np.int64(1) << 62
    keys_NK = np.where(present_NK, ranks_NK << 33 | counts_NK << 16 | half_NK, unused)
    keys_NK.sort(axis=1)
    kept_N = present_NK.sum(axis=1)
    keys_NK[keys_NK == unused] = 0
    return keys_NK >> 33, keys_NK >> 16 & (2 * MOST_UNITS - 1), (keys_NK & 0xFFFF).astype(np.uint16), kept_N


def _counts(
    weights_NK: Float64, exact_NK: npt.NDArray[np.bool_], uniform_N: Float64, units: int
) -> tuple[Int64, npt.NDArray[np.bool_]]:
    """Units of every exact token, and which tokens are kept: those with units, and the tail's when it has some."""
    heads_NK = np.where(exact_NK, weights_NK, 0.0)
    ends_NK = np.cumsum(heads_NK, axis=1) * (units / weights_NK.sum(axis=1, keepdims=True))
    ends_NK = np.rint(ends_NK * FINEST) / FINEST
    covered_NK = np.floor(ends_NK + uniform_N[:, None]).astype(np.int64).clip(max=units)
    counts_NK = np.diff(covered_NK, axis=1, prepend=0)
    drawn_NK = ~exact_NK & (weights_NK > 0)
    return counts_NK, (counts_NK > 0) | drawn_NK & (covered_NK[:, -1:] < units)


def _entropy_units(
    targets: SparseTargets, row_ids_N: torch.Tensor, positions_N: torch.Tensor, form: SparseFormat
) -> UInt8:
    assert targets.entropy_N is not None
    uniform_N = uniforms(form.seed, row_ids_N, positions_N, stream=ENTROPY_STREAM)[:, 0]
    return (targets.entropy_N.cpu().double() * ENTROPY_UNITS + uniform_N).floor().clamp(0, 255).byte().numpy()


def decode(
    values: Mapping[str, npt.NDArray[Any]], tokens_R: Int64, form: SparseFormat, alphabet: Alphabet
) -> SparseTargets:
    """The targets of rows from the numbers of their binary columns, as encode gives them.

    Raises ValueError or IndexError for numbers that do not go together.
    """
    present_NK = np.arange(form.kept) < values["kept"][:, None]
    ranks_NK, counts_NK = _ranks_and_counts(values, present_NK, tokens_R)
    if ranks_NK.size and ranks_NK.max() >= alphabet.size:
        raise ValueError(f"rank {ranks_NK.max()} in an alphabet of {alphabet.size}")
    ids_NK = torch.from_numpy(alphabet.ids_V[ranks_NK].astype(np.int64))
    entropy_N = torch.from_numpy(values["entropy"].astype(np.float32)) / ENTROPY_UNITS
    probs_NK = None
    if form.has_logprobs:
        probs = np.zeros(present_NK.shape)
        probs[present_NK] = np.exp(values["logprobs"].astype(np.float64))
        probs_NK = torch.from_numpy(probs)
    if form.codec == "topk":
        assert probs_NK is not None
        log_tail_N = torch.from_numpy(values["log_tail"].astype(np.float64))
        return _cut(ids_NK, probs_NK, torch.from_numpy(present_NK), log_tail_N, entropy_N)
    weights_NK = torch.from_numpy(_weights(counts_NK, present_NK, form.units))
    exact_NK = torch.from_numpy((counts_NK > 0) & (form.codec == "sampled"))
    return SparseTargets(ids_NK, weights_NK, exact_NK, None if probs_NK is None else probs_NK.float(), None, entropy_N)


def _ranks_and_counts(
    values: Mapping[str, npt.NDArray[Any]], present_NK: npt.NDArray[np.bool_], tokens_R: Int64
) -> tuple[Int64, Int64]:
    """Of every kept token; in unused slots the count is 0 and the rank any."""
    gap_class_NK, kept_N = np.zeros(present_NK.shape, np.uint8), present_NK.sum(axis=1)
    for after in range(present_NK.shape[1]):
        has_N = kept_N > after
        gap_class_NK[has_N, kept_N[has_N] - 1 - after] = values[f"gap_{after:02d}"]
    gap_class_M = gap_class_NK[present_NK]
    count_class_M = np.zeros(len(gap_class_M), np.uint8)
    if "weights" in values:
        count_class_M[gap_class_M >= COUNTED] = values["weights"]
    classes_2M = np.stack([gap_class_M % COUNTED, count_class_M], axis=1).ravel()
    rows_N = np.repeat(np.arange(len(tokens_R)), tokens_R)
    kept_R = np.bincount(rows_N, present_NK.sum(axis=1), len(tokens_R)).astype(np.int64)
    widths_2M = gap_coding.widths(classes_2M)
    starts_2M, _ = gap_coding.places(widths_2M, 2 * kept_R)
    both_2M = gap_coding.bases(classes_2M) + gap_coding.unpack(values["bits"], widths_2M, starts_2M)
    gaps_NK, counts_NK = np.zeros(present_NK.shape, np.int64), np.zeros(present_NK.shape, np.int64)
    gaps_NK[present_NK], counts_NK[present_NK] = both_2M[::2], both_2M[1::2]
    return np.cumsum(gaps_NK, axis=1), counts_NK


def _weights(counts_NK: Int64, present_NK: npt.NDArray[np.bool_], units: int) -> npt.NDArray[np.float32]:
    """Counts as shares of the units; what no count names is shared by the tail's tokens."""
    drawn_NK = present_NK & (counts_NK == 0)
    left_N1 = units - counts_NK.sum(axis=1, keepdims=True)
    each_N1 = left_N1 / np.maximum(drawn_NK.sum(axis=1, keepdims=True), 1)
    return (np.where(drawn_NK, each_N1, counts_NK) / units).astype(np.float32)


def _cut(
    ids_NK: torch.Tensor,
    probs_NK: torch.Tensor,
    present_NK: torch.Tensor,
    log_tail_N: torch.Tensor,
    entropy_N: torch.Tensor,
) -> SparseTargets:
    """topk's, divided by their sum, which rounding has moved from 1."""
    total_N = probs_NK.sum(dim=-1) + log_tail_N.exp()
    kept_NK = (probs_NK / total_N[:, None]).float()
    log_tail_N = (log_tail_N - total_N.log()).float()
    return SparseTargets(ids_NK, kept_NK, present_NK, kept_NK, log_tail_N, entropy_N)
