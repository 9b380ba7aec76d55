"""Divergences between a teacher of whom some tokens are kept and a student of whom all are known, at temperature 1.

Every loss here is a sum over the vocabulary of f(p_i, q_i), p the teacher's and q the student's probability. Of p only
the kept tokens are known, each with a weight w_i = p_i / pi_i, where pi_i is the probability of its being kept.

From a sample (codecs sampled, random). sum_kept f(p_i, q_i) / pi_i is right in the mean, but where f(0, q) > 0 a token
of no probability and never kept would have to count. So f is parted: f(p, q) = f(0, q) + (f(p, q) - f(0, q)). The
losses here are f-divergences, f = q phi(p / q), so that f(0, q) = kappa q with kappa = phi(0): it sums to kappa over
the vocabulary, exactly, and has no gradient. What remains vanishes with p and is estimated,

    loss = kappa + sum_kept (w_i / p_i) (f(p_i, q_i) - kappa q_i),

without bias, its gradient too, for every f with a finite kappa. The slope of the remainder with respect to log q_i is
at most a constant times p_i (each function names its own), so that a token's part of the gradient is at most that
constant times w_i: the variance is of the order of forward KL's. Forward KL has the slope -p_i, hence needs w_i alone;
the others need p_i of every kept token. Reverse KL has kappa = infinity: what the student gives to tokens that were not
kept is punished by log p of just those tokens, and no sample of the others says it. It is refused.

From a cut (codec topk). The tail of both sides is one more token, of masses P and Q. Merging tokens never raises an
f-divergence, so the loss is a lower bound, 0 for equal sides, and its gradient is biased: within the tail the student
gets no sign. Every divergence can be computed that way.

Shapes: N positions, K kept tokens.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from raydistill.losses.registry import RESPONSE_LOSSES
from raydistill.targets import SparseTargets

# log p, log q -> f(p, q) and its derivative by log q, both without kappa q.
Terms = Callable[[torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class SparseDivergence:
    """A loss as f less kappa q. from_sample says of its parameter whether a sample can estimate it (see above)."""

    terms: Terms
    kappa: Callable[[float], float]
    parameter: str = ""
    from_sample: Callable[[float], bool] = lambda value: True


def _forward_kl(log_p: torch.Tensor, log_q: torch.Tensor, _: float) -> tuple[torch.Tensor, torch.Tensor]:
    """f = p log(p / q); kappa 0; slope -p."""
    p = log_p.exp()
    return p * (log_p - log_q), -p


def _reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, _: float) -> tuple[torch.Tensor, torch.Tensor]:
    """f = q log(q / p); slope f + q."""
    q = log_q.exp()
    value = q * (log_q - log_p)
    return value, value + q


def _jsd(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """f = beta p log(p / m) + (1 - beta) q log(q / m), m = beta p + (1 - beta) q; kappa (1 - beta) log(1 / (1 - beta)).

    The slope is (1 - beta) q log(q / m), less kappa q: -(1 - beta) q log1p(x), x = beta p / ((1 - beta) q), which is at
    most beta p. At beta 0 and 1 the loss is forward and reverse KL, as in losses/response.
    """
    if beta == 0:
        return _forward_kl(log_p, log_q, beta)
    if beta == 1:
        return _reverse_kl(log_p, log_q, beta)
    p, q = log_p.exp(), log_q.exp()
    # log(m / ((1 - beta) q)): softplus of log x keeps what log(m) - log(q) loses where p is small.
    log_x = log_p - log_q + (math.log(beta) - math.log1p(-beta))
    excess = torch.nn.functional.softplus(log_x)
    slope = -(1 - beta) * q * excess
    return beta * p * (log_p - log_q - math.log1p(-beta) - excess) + slope, slope


def _skew_forward_kl(log_p: torch.Tensor, log_q: torch.Tensor, skew: float) -> tuple[torch.Tensor, torch.Tensor]:
    """f = p log(p / m), m = skew p + (1 - skew) q; kappa 0; slope -p (1 - skew) q / m, at most p."""
    p, log_m = log_p.exp(), _mixture(log_p, log_q, skew)
    return p * (log_p - log_m), -p * (log_q - log_m).exp() * (1 - skew)


def _skew_reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, skew: float) -> tuple[torch.Tensor, torch.Tensor]:
    """f = q log(q / m), m = (1 - skew) p + skew q; kappa log(1 / skew).

    With x = (1 - skew) p / (skew q): f less kappa q is -q log1p(x), its slope q (x / (1 + x) - log1p(x)), at most q x.
    """
    if skew == 0:
        return _reverse_kl(log_p, log_q, skew)
    q, log_x = log_q.exp(), log_p - log_q + (math.log1p(-skew) - math.log(skew))
    value = -q * torch.nn.functional.softplus(log_x)
    return value, value + q * torch.sigmoid(log_x)


def _total_variation(log_p: torch.Tensor, log_q: torch.Tensor, _: float) -> tuple[torch.Tensor, torch.Tensor]:
    """f = |q - p| / 2; kappa 1/2; less kappa q it is p / 2 - min(p, q), of slope -q where q < p and 0 above."""
    p, q = log_p.exp(), log_q.exp()
    above = torch.where(q < p, q, torch.where(q == p, q / 2, torch.zeros_like(q)))
    return p / 2 - torch.minimum(p, q), -above


def _mixture(log_p: torch.Tensor, log_q: torch.Tensor, share: float) -> torch.Tensor:
    """log(share p + (1 - share) q), share below 1."""
    return (
        log_q + math.log1p(-share)
        if share == 0
        else torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
    )


def _entropy_term(share: float) -> float:
    """share log(1 / share), 0 at both ends."""
    return -share * math.log(share) if 0 < share < 1 else 0.0


SPARSE_DIVERGENCES: Mapping[str, SparseDivergence] = {
    "forward_kl": SparseDivergence(_forward_kl, lambda _: 0.0),
    "reverse_kl": SparseDivergence(_reverse_kl, lambda _: 0.0, from_sample=lambda _: False),
    "jsd": SparseDivergence(_jsd, lambda beta: _entropy_term(1 - beta), "beta", lambda beta: beta < 1),
    "skew_forward_kl": SparseDivergence(_skew_forward_kl, lambda _: 0.0, "skew"),
    "skew_reverse_kl": SparseDivergence(
        _skew_reverse_kl, lambda skew: -math.log(skew) if skew else 0.0, "skew", lambda skew: skew > 0
    ),
    "total_variation": SparseDivergence(_total_variation, lambda _: 0.5),
}


def check_sparse_loss(
    codec: str, *, kind: str, parameters: Mapping[str, float], has_probabilities: bool = False
) -> None:
    """Raises ValueError, with the reason and the remedy, for a loss that targets of this codec do not determine.

    codec is one of a language model's cache; dense and hidden serve every loss that is a sum over positions.
    """
    loss = RESPONSE_LOSSES[kind]
    if loss.multi_label or not loss.row_separable:
        raise ValueError(f"{kind} is no loss of single positions; use one of {', '.join(SPARSE_DIVERGENCES)}")
    if codec in ("dense", "hidden"):
        return
    if kind not in SPARSE_DIVERGENCES:
        raise ValueError(
            f"{kind} needs every token's logit and a cache of codec {codec} keeps some; use codec hidden, or one of"
            f" {', '.join(SPARSE_DIVERGENCES)}"
        )
    if codec == "topk":
        return
    divergence, value = SPARSE_DIVERGENCES[kind], parameter_of(kind, parameters)
    if not divergence.from_sample(value):
        at = f" with {divergence.parameter} {value:g}" if divergence.parameter else ""
        raise ValueError(
            f"{kind}{at} weighs the student by the teacher's log-probability of tokens that a cache of codec {codec}"
            " did not keep; no sample estimates it. Use codec hidden, or forward_kl, jsd or skew_reverse_kl"
        )
    if kind != "forward_kl" and not has_probabilities:
        raise ValueError(
            f"{kind} needs the probability of each kept token and this cache of codec {codec} has only weights. Score"
            " with probabilities, or use forward_kl"
        )


def parameter_of(kind: str, parameters: Mapping[str, float]) -> float:
    """The loss's one parameter, by default or as given; 0 where it has none."""
    values = RESPONSE_LOSSES[kind].resolved(parameters)
    return values.get(SPARSE_DIVERGENCES[kind].parameter, 0.0)


def sparse_terms(
    kind: str, value: float, targets: SparseTargets, student_logprobs_NK: torch.Tensor, log_rest_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(loss_N, slopes_NK, rest_slope_N): the loss of each position, and its derivatives by log q.

    student_logprobs_NK are the student's of the kept tokens; log_rest_N of all others together, for targets with a
    tail, and rest_slope_N is the derivative by it. Of forward KL from a sample without entropy_N the loss lacks the
    teacher's entropy: it is the cross-entropy.
    """
    divergence, weights_NK = SPARSE_DIVERGENCES[kind], targets.weights_NK.to(student_logprobs_NK.dtype)
    if targets.log_tail_N is not None:
        assert log_rest_N is not None
        return _of_cut(divergence, value, targets, student_logprobs_NK, log_rest_N)
    if kind == "forward_kl" or (kind == "jsd" and value == 0):
        cross_entropy_N = -(weights_NK * student_logprobs_NK).sum(dim=-1)
        loss_N = cross_entropy_N if targets.entropy_N is None else cross_entropy_N - targets.entropy_N
        return loss_N, -weights_NK, None
    assert targets.probs_NK is not None, "check_sparse_loss was asked"
    used_NK = (weights_NK > 0) & (targets.probs_NK > 0)
    p_NK = targets.probs_NK.to(weights_NK.dtype).masked_fill(~used_NK, 1.0)
    value_NK, slope_NK = divergence.terms(p_NK.log(), student_logprobs_NK, value)
    counts_NK = (weights_NK / p_NK).masked_fill(~used_NK, 0.0)
    return divergence.kappa(value) + (counts_NK * value_NK).sum(dim=-1), counts_NK * slope_NK, None


def _of_cut(
    divergence: SparseDivergence, value: float, targets: SparseTargets, student_logprobs_NK: torch.Tensor,
    log_rest_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The kept tokens and one for the tail, which is left out where both sides have nothing there."""
    assert targets.log_tail_N is not None
    dtype = student_logprobs_NK.dtype
    tails = (targets.log_tail_N.to(dtype)[:, None], log_rest_N[:, None])
    log_p = torch.cat([targets.weights_NK.to(dtype).log(), tails[0]], dim=-1)
    log_q = torch.cat([student_logprobs_NK, tails[1]], dim=-1)
    # A side without mass: log of the smallest normal number, whose probability is 0 beside any other.
    least = math.log(torch.finfo(dtype).tiny)
    used = torch.cat([targets.weights_NK > 0, (log_p > least)[:, -1:] | (log_q > least)[:, -1:]], dim=-1)
    log_p, log_q = log_p.clamp(min=least), log_q.clamp(min=least)
    values, slopes = divergence.terms(log_p, log_q, value)
    values, slopes = values.masked_fill(~used, 0.0), slopes.masked_fill(~used, 0.0)
    # What f lacks, kappa q, sums to kappa over all.
    return divergence.kappa(value) + values.sum(dim=-1), slopes[:, :-1], slopes[:, -1]
