"""Losses between a teacher and a student with different tokenizers, at what their tokens of the same text share.

Both tokenisations of a text end at some of the same bytes. A span is what stands between two neighbouring such ends: a
few tokens of the teacher and a few of the student, smallest ones by construction.

spans: approximate likelihood matching (Minixhofer et al. 2025, arXiv:2503.20083). Of a span the teacher's probability
is p, the product of its tokens', and the student's q. "This span stands here" is a question with two answers, so that

    loss = tau * KL(p^(1/tau) || q^(1/tau)),   KL(x || y) = x log(x / y) + (1 - x) log((1 - x) / (1 - y)),

summed over spans. The paper's exponent 1/tau keeps a gradient where both find the text unlikely; the factor tau is
ours: it keeps the loss's size as tau changes. With a = -log p and b = -log q the derivative by b is (x - y) / (1 - y),
which becomes 1 - a / b as tau grows. Spans are not weighed by how alike the tokenisers' habits are at their ends, as
the paper also does. By its label's log-probability alone a position has the gradient of a weighted cross-entropy, so
that spans are fused with the output layer as cross-entropy is.

uld: universal logit distillation (Boizard et al. 2024, arXiv:2402.12030). Where a span begins, both predict what
follows the same bytes. The loss is the L1 distance of their probabilities, sorted from the likeliest token on, the
shorter list padded with zeros. Of a teacher of whom some tokens are kept the ranks of those are compared and the rest
of both sides as one sum, a lower bound by the triangle inequality.

Shapes: N positions, C positions of a chunk, J spans, M positions compared by rank, K ranks, V vocabulary.
"""

from __future__ import annotations

import math

import torch

from raydistill.targets import HiddenTargets, RankTargets, SpanTargets, SparseTargets

CROSS_TOKENIZER = ("spans", "uld")
LEAST_NATS = 1e-5  # of a span: a probability nearer to 1 is rounding of float32


def span_terms(
    teacher_logprobs_J: torch.Tensor, student_logprobs_J: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss_J, slopes_J): each span's loss in nats, at least 0, and its derivative by -log q. float64.

    Raises ValueError on a shape mismatch or a temperature that is not positive.
    """
    if teacher_logprobs_J.shape != student_logprobs_J.shape:
        raise ValueError(
            f"spans of teacher {tuple(teacher_logprobs_J.shape)}, student {tuple(student_logprobs_J.shape)}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0, found {temperature}")
    a_J = (-teacher_logprobs_J.double()).clamp(min=LEAST_NATS) / temperature
    b_J = (-student_logprobs_J.double()).clamp(min=LEAST_NATS) / temperature
    likely_J, unlikely_J = torch.exp(-a_J), -torch.expm1(-a_J)
    loss_J = temperature * (likely_J * (b_J - a_J) + unlikely_J * (_log1mexp(a_J) - _log1mexp(b_J)))
    slopes_J = (torch.expm1(-a_J) - torch.expm1(-b_J)) / -torch.expm1(-b_J)
    return loss_J.clamp(min=0), slopes_J


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(-x)) of x > 0 without loss at either end."""
    return torch.where(x < math.log(2), torch.log(-torch.expm1(-x)), torch.log1p(-torch.exp(-x)))


def span_loss(
    targets: SpanTargets, label_logprobs_C: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over spans, and for each position the derivative by the negative log-probability of its label.

    The spans are of these positions, each of them whole. A position in no span has derivative 0.
    """
    counts_J = targets.ends_J - targets.begins_J
    owner_S = torch.repeat_interleave(torch.arange(len(counts_J), device=counts_J.device), counts_J)
    before_J = torch.cumsum(counts_J, 0) - counts_J
    places_S = torch.arange(len(owner_S), device=owner_S.device) - before_J[owner_S] + targets.begins_J[owner_S]
    sums_J = torch.zeros(len(counts_J), dtype=torch.float64, device=counts_J.device)
    sums_J.index_add_(0, owner_S, label_logprobs_C[places_S].double())
    loss_J, slopes_J = span_terms(targets.logprobs_J, sums_J, temperature=temperature)
    slopes_C = torch.zeros_like(label_logprobs_C)
    slopes_C[places_S] = slopes_J[owner_S].to(slopes_C.dtype)
    return loss_J.sum().to(label_logprobs_C.dtype), slopes_C


def whole_spans(positions: int, chunk: int, targets: SpanTargets) -> list[tuple[int, int]]:
    """(begin, end) of chunks of about so many positions, none of which ends within a span."""
    # A border before a position is within a span from the span's second position on.
    inside = torch.zeros(positions + 1, dtype=torch.int64)
    begins_J, ends_J = targets.begins_J.cpu(), targets.ends_J.cpu()
    inside.index_add_(0, begins_J + 1, torch.ones_like(begins_J))
    inside.index_add_(0, ends_J, -torch.ones_like(ends_J))
    borders = (inside.cumsum(0) == 0).nonzero()[:, 0].tolist()
    found, start, last = list[tuple[int, int]](), 0, 0
    for border in borders[1:]:
        if border - start > chunk and last > start:
            found.append((start, last))
            start = last
        last = border
    return [*found, (start, last)] if last > start else found


def rank_loss(
    targets: RankTargets, logits_CV: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over the compared positions of the distance by rank, and its derivative by the logits (C, V).

    The targets' places are of these positions. Raises ValueError where the teacher's ranks are not known.
    """
    teacher_MK, rest_M = sorted_probs(targets.teacher, temperature)
    slope_CV = torch.zeros_like(logits_CV)
    leaf_MV = logits_CV[targets.places_M].detach().requires_grad_()
    if not len(leaf_MV):
        return logits_CV.new_zeros(()), slope_CV
    with torch.enable_grad():
        loss = rank_distance(teacher_MK, rest_M, leaf_MV, temperature=temperature)
        (slope_MV,) = torch.autograd.grad(loss, leaf_MV)
    slope_CV[targets.places_M] = slope_MV
    return loss.detach(), slope_CV


def rank_distance(
    teacher_MK: torch.Tensor, rest_M: torch.Tensor | None, student_MV: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """Sum over positions of the L1 distance of sorted probabilities (arXiv:2402.12030, the closed form of its optimal
    transport).

    teacher_MK fall; rest_M is the mass of all tokens that are not among them, where some were cut: then a 0 is a rank
    that is not known. student_MV are logits.
    """
    probs_MV = (student_MV / temperature).softmax(dim=-1)
    ranks = min(teacher_MK.shape[1], probs_MV.shape[1])
    student_MK = probs_MV.topk(ranks, dim=-1).values
    compared_MK, beyond_M = teacher_MK[:, :ranks].to(probs_MV.dtype), teacher_MK[:, ranks:].sum(dim=-1)
    if rest_M is not None:
        known_MK = compared_MK > 0
        beyond_M, student_MK = beyond_M + rest_M, student_MK * known_MK
    distance_M = (compared_MK - student_MK).abs().sum(dim=-1)
    return (distance_M + (beyond_M.to(probs_MV.dtype) - (1 - student_MK.sum(dim=-1))).abs()).sum()


def sorted_probs(
    teacher: SparseTargets | HiddenTargets | torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The teacher's probabilities from the likeliest token on (M, K), and the mass of those that are not known.

    Of a sample the tokens that were kept for certain are the likeliest ones; the drawn ones have no rank.
    """
    if isinstance(teacher, SparseTargets):
        weights_MK = torch.where(teacher.exact_NK, teacher.weights_NK, torch.zeros_like(teacher.weights_NK))
        if teacher.log_tail_N is not None:
            weights_MK = teacher.weights_NK
        kept_MK = weights_MK.sort(dim=-1, descending=True).values
        return kept_MK, (1 - kept_MK.sum(dim=-1)).clamp(min=0)
    logits_MV = teacher.head.logits(teacher.hidden_ND) if isinstance(teacher, HiddenTargets) else teacher.float()
    return (logits_MV / temperature).softmax(dim=-1).sort(dim=-1, descending=True).values, None


def check_cross_codec(cross_tokenizer: str, codec: str) -> None:
    """Raises ValueError, with the reason and the remedy, for a cache whose codec cannot serve the loss."""
    if cross_tokenizer == "uld" and codec == "random":
        raise ValueError(
            "uld compares probabilities by rank, and of a cache of codec random, drawn with replacement, none is known."
            " Use codec sampled, topk or hidden, or cross_tokenizer: spans"
        )
