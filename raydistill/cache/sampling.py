"""From a chunk of next-token logits to what a sparse cache keeps of them, on the device where the logits are.

`sampled_targets` keeps a head of likely tokens exactly and draws some of the others without replacement, as many as the
position needs, `drawn_targets` draws with replacement (RS-KD), `top_targets` cuts. All are at temperature 1.

The first in full. An estimate of a distribution p from K kept tokens is w_i = p_i / pi_i for kept tokens and 0 for the
others, where pi_i > 0 is the probability that token i is kept. Its mean is p whatever the pi are (Horvitz and Thompson
1952), and with it that of every function that is linear in p: the cross-entropy -sum_i w_i log q_i with the student q,
and the gradient of KL(p || q) with respect to the student's logits, q - w.

Which pi? The summed variance of a position is sum_i p_i^2 (1 / pi_i - 1), to be made least under sum_i pi_i = K and
pi_i <= 1. With a multiplier for the sum, p_i^2 / pi_i^2 is the same for every token that is not at the bound:
pi_i = min(1, c p_i). The level c is found as water finds its own: with h tokens at the bound, all from the top, the
K - h other draws share the remaining mass R_h, so c_h = (K - h) / R_h; h grows while the next token has c_h p >= 1. If
token h stays below, so does the next: c_h p_h < 1 gives p_h (K - h - 1) < R_h - p_h = R_{h+1}, and the next is not
likelier. So every token above the threshold 1 / c is kept exactly, and each token of the tail that is drawn counts
R / (K - h), all of them the same.

Which K? Positions differ: where the teacher is sure two tokens say all. A batch's gradient sums over positions, and
with the multiplier of the sum of all their K the level c is the same for all of them (the allocation of Neyman 1934).
So c is given: K_max. Tokens of at least 1 / K_max are the head, h of them, and the tail of mass R is drawn n times, n
the first number whose next draw would save less variance than a draw is worth, R^2 / n - R^2 / (n + 1) <= 1 / K_max^2:
about R K_max to the nearest number, and 1 at least. No position has more than K_max, since h / K_max + R <= 1.

How to draw exactly n = K - h tokens with probabilities n p_i / R < 1? Systematically (Madow 1949, "On the theory of
systematic sampling, II"): lay the tail's probabilities end to end on [0, R) and take the tokens that lie under the n
points (u + j) R / n, j = 0 .. n - 1, of a comb with one uniform offset u. A token's stretch is shorter than the comb's
spacing, so that it is met once at most, with probability p_i n / R. The weights sum to 1 in every draw and not only in
the mean. Drawing with replacement N times and counting (Random Sampling KD, Anshumann et al. 2025, arXiv:2503.16870,
section 3) is unbiased too; at the same number of kept tokens its variance is larger.

Shapes: N positions, V vocabulary, K kept tokens, B blocks of the vocabulary, S tokens of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from raydistill.cache.counter_random import DRAWS_STREAM, TAIL_STREAM, uniforms
from raydistill.targets import SparseTargets

BLOCK = 128
LEAST = torch.finfo(torch.float32).min
PIECE_NUMBERS = 1 << 20  # logits that are reduced at once where they pass through a processor's cache
THIN = 1e-30  # a tail whose tokens' own probabilities leave float32


class Head(Protocol):
    """What makes logits of hidden states, in two parts: a product, and what is done with each of its numbers."""

    def products(self, hidden_ND: torch.Tensor) -> torch.Tensor: ...

    def from_products(self, products_NV: torch.Tensor) -> torch.Tensor: ...


def sampled_targets(
    logits_NV: torch.Tensor, row_ids_N: torch.Tensor, positions_N: torch.Tensor, *, width: int, seed: int
) -> SparseTargets:
    """Head exact, tail by a systematic sample; K = min(width, V) slots, of which a position uses what it needs.

    Unbiased, and the weights of a position sum to 1. Tokens of at least 1 / width are exact, each drawn one counts
    about so much. Slots that are not used are the last ones. Logits are of any floating type; the distribution is
    computed in float32 and sums over it in float64. Raises ValueError for a width below 2 or a logit that is not
    finite.
    """
    _check(width, least=2)
    slots = min(width, logits_NV.shape[1])
    slots_K = torch.arange(slots, device=logits_NV.device)
    spread = _Spread(logits_NV, slots)
    top_NK, ids_NK = spread.top_NK, spread.top_ids_NK
    spread.put(ids_NK, torch.zeros_like(top_NK))
    kept_N1 = _needed(top_NK.double(), spread.total_N, width) if slots < logits_NV.shape[1] else None
    head_NK = _head(top_NK.double(), spread.total_N, kept_N1)
    spread.put(ids_NK, top_NK.masked_fill(head_NK, 0.0))
    heads_N1 = head_NK.sum(dim=-1, keepdim=True)
    draws_N1 = heads_N1.new_zeros(()) if kept_N1 is None else kept_N1 - heads_N1
    drawn_NK = ~head_NK & (slots_K < heads_N1 + draws_N1)
    offsets_N1 = uniforms(seed, row_ids_N, positions_N, stream=TAIL_STREAM)
    teeth_NK = (offsets_N1 + slots_K - heads_N1).clamp_min_(0) / draws_N1.clamp_min(1)
    ids_NK = ids_NK.masked_scatter(drawn_NK, spread.under(teeth_NK, drawn_NK))
    weights_NK = torch.where(drawn_NK, spread.total_N[:, None] / draws_N1.clamp_min(1), top_NK * head_NK)
    total_N1 = weights_NK.sum(dim=-1, keepdim=True)
    weights_NK = (weights_NK / total_N1).float()
    probs_NK = torch.where(drawn_NK, (spread.at(ids_NK) / total_N1).float(), weights_NK)
    return SparseTargets(ids_NK, weights_NK, head_NK, probs_NK=probs_NK, entropy_N=spread.entropy_N)


def _needed(top_NK: torch.Tensor, rest_N: torch.Tensor, width: int) -> torch.Tensor:
    """(N, 1): how many tokens a position keeps. rest_N is the mass of all tokens but the likeliest ones, top_NK.

    The least n with n (n + 1) >= (width R)^2 is the last whose draw saves more variance than it is worth.
    """
    head_NK = top_NK * width >= 1
    rest_N1 = rest_N[:, None] + (top_NK * ~head_NK).sum(dim=-1, keepdim=True)
    draws_N1 = ((0.25 + (width * rest_N1).square()).sqrt() - 0.5).ceil().clamp_min_(1)
    return (head_NK.sum(dim=-1, keepdim=True) + draws_N1.long()).clamp_max_(top_NK.shape[1])


def _head(top_NK: torch.Tensor, rest_N: torch.Tensor, kept_N1: torch.Tensor | None) -> torch.Tensor:
    """Which of the likeliest tokens are at or above the threshold; all of them where they are the whole vocabulary.

    Token i, from 0, is when p_i (K - i) >= R_i, the mass from it on. R_i is summed from its end: 1 less the head's mass
    would be rounding where the tail is thin.
    """
    if kept_N1 is None:
        return torch.ones_like(top_NK, dtype=torch.bool)
    from_here_NK = top_NK.flip(1).cumsum(dim=-1).flip(1) + rest_N[:, None]
    left_NK = kept_N1 - torch.arange(top_NK.shape[1], device=top_NK.device)
    return (top_NK * left_NK >= from_here_NK) & (left_NK > 0)


class _Spread:
    """A position's probabilities, in blocks of the vocabulary, with the blocks' sums and the K likeliest tokens.

    A few passes over the logits and no sort of them: a softmax, each block's largest and its sum, and the sum of p z
    for the entropy, log sum e^z - sum p z. A block's sum is taken in float32, that of blocks in float64, a position's
    alike in any batch.
    """

    def __init__(self, logits_NV: torch.Tensor, kept: int) -> None:
        """Raises ValueError for a logit that is not finite: then the entropy is not a number."""
        self._vocabulary = logits_NV.shape[1]
        logits_NV = logits_NV.float()
        if missing := -self._vocabulary % BLOCK:  # what fills the last block up is no token: p is 0, and p z too
            logits_NV = F.pad(logits_NV, (0, missing), value=LEAST)
        self._probs_NBS = logits_NV.softmax(dim=-1).unflatten(1, (-1, BLOCK))
        self._maxima_NB = self._probs_NBS.amax(dim=-1)
        self.sums_NB = self._probs_NBS.sum(dim=-1).double()
        mean_N = (self._probs_NBS * logits_NV.unflatten(1, (-1, BLOCK))).sum(dim=-1).sum(dim=-1, dtype=torch.float64)
        self.top_NK, self.top_ids_NK = self._largest(kept)
        total_N = self.total_N  # 1 but for some 1e-6, which are of all probabilities alike
        log_sum_N = logits_NV.gather(1, self.top_ids_NK[:, :1])[:, 0].double() - (self.top_NK[:, 0] / total_N).log()
        self.entropy_N = (log_sum_N - mean_N / total_N).clamp_min_(0).float()
        if not torch.isfinite(self.entropy_N).all():
            raise ValueError("a teacher's logit is not finite. Check its weights, or use teacher.dtype=float32")

    @property
    def total_N(self) -> torch.Tensor:
        """The sum of what there is now: about 1, until something is put in its place."""
        return self.sums_NB.sum(dim=-1)

    def _largest(self, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the likeliest tokens have, most first, and their ids. They stand in the blocks of the largest maxima."""
        blocks_NK = self._maxima_NB.topk(min(kept, self._maxima_NB.shape[1]), dim=-1).indices
        probs_NKS = self._blocks(blocks_NK)
        if self._vocabulary % BLOCK:  # what fills the last block up is below tokens whose probability is 0 in float32
            last_NK1 = (blocks_NK == self._vocabulary // BLOCK)[:, :, None]
            filling_S = torch.arange(BLOCK, device=blocks_NK.device) >= self._vocabulary % BLOCK
            probs_NKS = probs_NKS.masked_fill_(last_NK1 & filling_S, -1.0)
        top_NK, places_NK = probs_NKS.flatten(1).topk(kept, dim=-1)
        return top_NK, blocks_NK.gather(1, places_NK // BLOCK) * BLOCK + places_NK % BLOCK

    def put(self, ids_NK: torch.Tensor, values_NK: torch.Tensor) -> None:
        """Gives these tokens, no one twice, something else."""
        self._probs_NBS.flatten(1).scatter_(1, ids_NK, values_NK)
        blocks_NK = ids_NK // BLOCK
        self.sums_NB.scatter_(1, blocks_NK, self._blocks(blocks_NK).sum(dim=-1).double())

    def at(self, ids_NK: torch.Tensor) -> torch.Tensor:
        """What these tokens have, float64."""
        return self._probs_NBS.flatten(1).gather(1, ids_NK).double()

    def under(self, shares_NK: torch.Tensor, wanted_NK: torch.Tensor) -> torch.Tensor:
        """(M,): the tokens under the wanted points of all that there is laid end to end, given as shares of its sum.

        In two steps, blocks of tokens and tokens of a block, so that no running sum over the vocabulary is made. A
        token that has nothing is never under a point, unless none of its position has anything.
        """
        ends_NB = self.sums_NB.cumsum(dim=-1)
        points_NK = shares_NK * ends_NB[:, -1:]
        blocks_NK = _first_above(ends_NB, points_NK)
        inside_NK = points_NK - F.pad(ends_NB, (1, 0)).gather(1, blocks_NK)
        blocks_M = blocks_NK[wanted_NK]
        positions_M = wanted_NK.nonzero()[:, 0]
        ends_MS = self._probs_NBS[positions_M, blocks_M].double().cumsum(dim=-1)
        tokens_M1 = _first_above(ends_MS, inside_NK[wanted_NK][:, None])
        # Where nothing is the point is in the padding.
        return (blocks_M * BLOCK + tokens_M1[:, 0]).clamp_max_(self._vocabulary - 1)

    def _blocks(self, blocks_NK: torch.Tensor) -> torch.Tensor:
        """(N, K, S), as whole rows of memory: gather would take them number by number."""
        positions, blocks, _ = self._probs_NBS.shape
        rows_NK = blocks_NK + torch.arange(0, positions * blocks, blocks, device=blocks_NK.device)[:, None]
        return self._probs_NBS.flatten(0, 1).index_select(0, rows_NK.flatten()).view(*blocks_NK.shape, BLOCK)


def _first_above(ends: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The first place of each row whose running sum is above the point; a point at the very end is moved before it."""
    last = torch.nextafter(ends[:, -1:], torch.zeros_like(ends[:, -1:]))
    return torch.searchsorted(ends, torch.minimum(points, last), right=True).clamp_max_(ends.shape[1] - 1)


def drawn_targets(
    logits_NV: torch.Tensor, row_ids_N: torch.Tensor, positions_N: torch.Tensor, *, draws: int, seed: int
) -> SparseTargets:
    """RS-KD: so many draws with replacement from the teacher, each counting 1 / draws; unbiased, weights sum to 1.

    Anshumann et al. 2025, arXiv:2503.16870, section 3, with the teacher itself as the proposal. K = draws; a token
    that was drawn again has one slot. Raises ValueError for fewer than 1 draw or a logit that is not finite.
    """
    _check(draws, least=1)
    spread = _Spread(logits_NV, 1)
    shares_NK = uniforms(seed, row_ids_N, positions_N, stream=DRAWS_STREAM, draws=draws).sort(dim=-1).values
    every_NK = torch.ones_like(shares_NK, dtype=torch.bool)
    ids_NK = spread.under(shares_NK, every_NK).view_as(shares_NK)  # ascending, like the shares
    same_NKK = ids_NK[:, :, None] == ids_NK[:, None, :]
    first_NK = ~same_NKK.tril(-1).any(dim=-1)
    weights_NK = same_NKK.sum(dim=-1).float() / draws * first_NK
    probs_NK = (spread.at(ids_NK) / spread.total_N[:, None]).float()
    return SparseTargets(ids_NK, weights_NK, torch.zeros_like(first_NK), probs_NK, entropy_N=spread.entropy_N)


def top_targets(logits_NV: torch.Tensor, *, width: int) -> SparseTargets:
    """The K = min(width, V) likeliest tokens and the mass of the others in one number: biased, for comparison.

    The tail is summed over the others themselves: 1 less the head's mass would be rounding where it is thin. Raises
    ValueError for a width below 1 or a logit that is not finite.
    """
    _check(width, least=1)
    kept = min(width, logits_NV.shape[1])
    spread = _Spread(logits_NV, kept)
    total_N, top_NK, ids_NK = spread.total_N, spread.top_NK, spread.top_ids_NK
    spread.put(ids_NK, torch.zeros_like(top_NK))
    log_tail_N = ((rest_N := spread.total_N).log() - total_N.log()).float()
    thin_N = rest_N < THIN
    if kept < logits_NV.shape[1] and thin_N.any():
        others_NV = logits_NV[thin_N].float().log_softmax(dim=-1).scatter_(1, ids_NK[thin_N], float("-inf"))
        log_tail_N[thin_N] = others_NV.logsumexp(dim=-1)
    probs_NK = (top_NK / total_N[:, None]).float()
    exact_NK = torch.ones_like(ids_NK, dtype=torch.bool)
    return SparseTargets(ids_NK, probs_NK, exact_NK, probs_NK, log_tail_N, spread.entropy_N)


def reduced(
    hidden_ND: torch.Tensor, head: Head, keep: Callable[..., SparseTargets], *,
    row_ids_N: torch.Tensor, positions_N: torch.Tensor, chunk: int,
) -> SparseTargets:  # fmt: skip
    """The targets of all positions, `chunk` of them at a time: the largest tensor is chunk x vocabulary.

    keep takes (logits, row ids, positions), on a processor of so many of a chunk at once as its cache holds. What is
    kept of a position follows from its logits, its row id and its position in the row, so that neither changes it.
    """
    found: list[SparseTargets] = []
    with torch.no_grad():
        for start in range(0, len(hidden_ND), chunk):
            cut = slice(start, start + chunk)
            products_CV, row_ids_C, positions_C = head.products(hidden_ND[cut]), row_ids_N[cut], positions_N[cut]
            piece = max(1, PIECE_NUMBERS // products_CV.shape[1]) if products_CV.device.type == "cpu" else chunk
            for first in range(0, len(products_CV), piece):
                some = slice(first, first + piece)
                found.append(keep(head.from_products(products_CV[some]), row_ids_C[some], positions_C[some]))
    return SparseTargets.joined(found)


def _check(width: int, *, least: int) -> None:
    if width < least:
        raise ValueError(f"a position keeps at least {least} tokens, found {width}")
