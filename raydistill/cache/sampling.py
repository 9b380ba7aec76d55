"""From a chunk of next-token logits to what a sparse cache keeps of them, on the device where the logits are.

`sampled_targets` keeps a head of likely tokens exactly and draws some of the others without replacement,
`drawn_targets` draws with replacement (RS-KD), `top_targets` cuts. All are at temperature 1.

The first in full. An estimate of a distribution p from K kept tokens is w_i = p_i / pi_i for kept tokens and 0 for the
others, where pi_i > 0 is the probability that token i is kept. Its mean is p whatever the pi are (Horvitz and Thompson
1952), and with it that of every function that is linear in p: the cross-entropy -sum_i w_i log q_i with the student q,
and the gradient of KL(p || q) with respect to the student's logits, q - w.

Which pi? The summed variance is sum_i p_i^2 (1 / pi_i - 1), to be made least under sum_i pi_i = K and pi_i <= 1. With a
multiplier for the sum, p_i^2 / pi_i^2 is the same for every token that is not at the bound: pi_i = min(1, c p_i). The
level c is found as water finds its own: with h tokens at the bound, all from the top, the K - h other draws share the
remaining mass R_h, so c_h = (K - h) / R_h; h grows while the next token has c_h p >= 1. If token h stays below, so does
the next: c_h p_h < 1 gives p_h (K - h - 1) < R_h - p_h = R_{h+1}, and the next is not likelier. So every token above
the threshold 1 / c is kept exactly, and each token of the tail that is drawn counts R / (K - h), all of them the same.

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

import torch
import torch.nn.functional as F

from raydistill.cache.counter_random import DRAWS_STREAM, TAIL_STREAM, uniforms
from raydistill.targets import SparseTargets

BLOCK = 256


def sampled_targets(
    logits_NV: torch.Tensor, row_ids_N: torch.Tensor, positions_N: torch.Tensor, *, width: int, seed: int
) -> SparseTargets:
    """Head exact, tail by a systematic sample: K = min(width, V) tokens of each position; unbiased, weights sum to 1.

    Logits are of any floating type; the distribution is computed in float32 and its sums in float64. Raises ValueError
    for a width below 2 or a logit that is not finite.
    """
    _check(logits_NV, width, least=2)
    probs_NV = F.softmax(logits_NV.float(), dim=-1)
    entropy_N = torch.special.entr(probs_NV).sum(dim=-1)
    kept = min(width, probs_NV.shape[1])
    top_NK, ids_NK = probs_NV.topk(kept, dim=-1)
    rest_N = probs_NV.scatter(1, ids_NK, 0.0).sum(dim=-1, dtype=torch.float64)
    head_NK = _head(top_NK.double(), rest_N, whole=kept == probs_NV.shape[1])
    tail_NV = probs_NV.scatter_(1, ids_NK, top_NK.masked_fill(head_NK, 0.0))
    heads_N1 = head_NK.sum(dim=-1, keepdim=True)
    offsets_N1 = uniforms(seed, row_ids_N, positions_N, stream=TAIL_STREAM)
    teeth_NK = offsets_N1 + torch.arange(kept, device=heads_N1.device) - heads_N1
    found_NK, mass_N1 = _under(tail_NV, teeth_NK.clamp_min_(0) / (kept - heads_N1).clamp_min(1))
    weights_NK = torch.where(head_NK, top_NK.double(), mass_N1 / (kept - heads_N1).clamp_min(1))
    weights_NK = (weights_NK / weights_NK.sum(dim=-1, keepdim=True)).float()
    probs_NK = torch.where(head_NK, weights_NK, tail_NV.gather(1, found_NK))
    ids_NK = torch.where(head_NK, ids_NK, found_NK)
    return SparseTargets(ids_NK, weights_NK, head_NK, probs_NK=probs_NK, entropy_N=entropy_N)


def _head(top_NK: torch.Tensor, rest_N: torch.Tensor, *, whole: bool) -> torch.Tensor:
    """Which of the likeliest tokens are at or above the threshold; all of them where they are the whole vocabulary.

    Token i, from 0, is when p_i (K - i) >= R_i, the mass from it on. R_i is summed from its end: 1 less the head's mass
    would be rounding where the tail is thin.
    """
    if whole:
        return torch.ones_like(top_NK, dtype=torch.bool)
    kept = top_NK.shape[1]
    from_here_NK = top_NK.flip(1).cumsum(dim=-1).flip(1) + rest_N[:, None]
    return top_NK * (kept - torch.arange(kept, device=top_NK.device)) >= from_here_NK


def _under(mass_NV: torch.Tensor, shares_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens under points of the masses laid end to end, given as shares of their sum; and the sum, (N, 1).

    In two steps, blocks of tokens and tokens of a block, so that no running sum over the vocabulary is made. A token
    without mass is never under a point, unless the position has no mass at all.
    """
    blocks_NBS = F.pad(mass_NV, (0, -mass_NV.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    ends_NB = blocks_NBS.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    points_NK = shares_NK * ends_NB[:, -1:]
    block_NK = _first_above(ends_NB, points_NK)
    begins_NB = F.pad(ends_NB, (1, 0))
    within_NKS = blocks_NBS.gather(1, block_NK[..., None].expand(-1, -1, BLOCK)).double().cumsum(dim=-1)
    inside_NK = points_NK - begins_NB.gather(1, block_NK)
    token_NK = _first_above(within_NKS.flatten(0, 1), inside_NK.reshape(-1, 1)).view_as(block_NK)
    # Without any mass the point is in the padding.
    return (block_NK * BLOCK + token_NK).clamp_max_(mass_NV.shape[1] - 1), ends_NB[:, -1:]


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
    _check(logits_NV, draws, least=1)
    probs_NV = F.softmax(logits_NV.float(), dim=-1)
    shares_NK = uniforms(seed, row_ids_N, positions_N, stream=DRAWS_STREAM, draws=draws).sort(dim=-1).values
    ids_NK, _ = _under(probs_NV, shares_NK)  # ascending, like the shares
    same_NKK = ids_NK[:, :, None] == ids_NK[:, None, :]
    first_NK = ~same_NKK.tril(-1).any(dim=-1)
    weights_NK = same_NKK.sum(dim=-1).float() / draws * first_NK
    probs_NK = probs_NV.gather(1, ids_NK)
    return SparseTargets(
        ids_NK, weights_NK, torch.zeros_like(first_NK), probs_NK, entropy_N=torch.special.entr(probs_NV).sum(dim=-1)
    )


def top_targets(logits_NV: torch.Tensor, *, width: int) -> SparseTargets:
    """The K = min(width, V) likeliest tokens and the mass of the others in one number: biased, for comparison.

    The tail is summed over the others themselves: 1 less the head's mass would be rounding where it is thin. Raises
    ValueError for a width below 1 or a logit that is not finite.
    """
    _check(logits_NV, width, least=1)
    logprobs_NV = F.log_softmax(logits_NV.float(), dim=-1)
    entropy_N = torch.special.entr(logprobs_NV.exp()).sum(dim=-1)
    top_NK, ids_NK = logprobs_NV.topk(min(width, logprobs_NV.shape[1]), dim=-1)
    log_tail_N = logprobs_NV.scatter_(1, ids_NK, float("-inf")).logsumexp(dim=-1)
    probs_NK = top_NK.exp()
    exact_NK = torch.ones_like(ids_NK, dtype=torch.bool)
    return SparseTargets(ids_NK, probs_NK, exact_NK, probs_NK, log_tail_N, entropy_N)


def reduced(
    hidden_ND: torch.Tensor, to_logits: Callable[[torch.Tensor], torch.Tensor], keep: Callable[..., SparseTargets],
    *, row_ids_N: torch.Tensor, positions_N: torch.Tensor, chunk: int,
) -> SparseTargets:  # fmt: skip
    """The targets of all positions, `chunk` of them at a time: the largest tensor is chunk x vocabulary.

    keep takes (logits, row ids, positions) of a chunk. What is kept of a position follows from its logits, its row id
    and its position in the row, so that the chunk changes nothing.
    """
    starts = range(0, len(hidden_ND), chunk)
    cuts = [slice(start, start + chunk) for start in starts]
    with torch.no_grad():
        return SparseTargets.joined([keep(to_logits(hidden_ND[cut]), row_ids_N[cut], positions_N[cut]) for cut in cuts])


def _check(logits_NV: torch.Tensor, width: int, *, least: int) -> None:
    if width < least:
        raise ValueError(f"a position keeps at least {least} tokens, found {width}")
    if not torch.isfinite(logits_NV).all():
        raise ValueError("a teacher's logit is not finite. Check its weights, or use teacher.dtype=float32")
