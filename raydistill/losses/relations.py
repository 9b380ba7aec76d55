"""Losses on relations, which need no projection where the widths differ: between a row's tokens, between rows.

Each is a sum over rows in float32, whatever the inputs' dtype, outside autocast; the caller divides once by the global
count of rows. No gradient reaches the teacher. The larger gradients are computed beside the loss, block by block, so
that no tensor of all heads' or all triples' size is kept.

Shapes: N rows, L tokens, W the student's width, V the teacher's, R relation heads, D = width / R.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from raydistill.losses.token_mask import real_tokens, token_counts

# Larger components are cut to this: their products, summed over a head, still fit float32 ...
LARGEST_COMPONENT = 1e15
# ... and stay far from the score of a padded key, which is finite so that its difference is too.
PADDED_SCORE = -1e36
# The angles are computed for as many vertices at a time as keep a tensor of directions below this (64 MiB).
MAX_DIRECTION_ELEMENTS = 1 << 24


def relation_kl_sum(
    teacher_NLV: torch.Tensor, student_NLW: torch.Tensor, mask_NL: torch.Tensor, *, relation_heads: int
) -> torch.Tensor:
    """Sum over rows of KL(teacher || student) in nats between self-relations, averaged over heads and real tokens.

    A relation of queries, keys or values X is softmax(X_r X_r^T / sqrt(D)) for each relation head r, over the row's
    real tokens: give queries to both sides for the query-query relation, and so on. With values and as many relation
    heads as the teacher has attention heads it is the value relation of MiniLM (Wang et al. 2020, arXiv:2002.10957,
    section 3.2), else those of MiniLMv2 (Wang et al. 2021, arXiv:2012.15828, section 3.1).

    Components beyond 1e15 count as 1e15. A row without real tokens adds 0. Raises ValueError when rows or tokens
    differ, or when relation_heads does not divide both widths.
    """
    if teacher_NLV.dim() != 3 or student_NLW.dim() != 3 or teacher_NLV.shape[:2] != student_NLW.shape[:2]:
        raise ValueError(
            f"teacher {tuple(teacher_NLV.shape)} and student {tuple(student_NLW.shape)}: expected the same rows and"
            " tokens, then a width"
        )
    for owner, width in (("teacher", teacher_NLV.shape[2]), ("student", student_NLW.shape[2])):
        if relation_heads < 1 or width % relation_heads:
            raise ValueError(
                f"relation_heads: found {relation_heads}, which does not divide the {owner}'s width {width}."
                " Use a common divisor of both widths"
            )
    real_NL = real_tokens(mask_NL, *student_NLW.shape[:2])
    return _RelationKL.apply(student_NLW, teacher_NLV.detach(), real_NL, relation_heads)


def rkd_distance_sum(teacher_NV: torch.Tensor, student_NW: torch.Tensor) -> torch.Tensor:
    """Sum over rows of the mean, over a row's N - 1 partners, of the Huber loss between normalised distances.

    Divided by N it is the mean over ordered pairs of different rows in RKD (Park et al. 2019, arXiv:1904.05068, section
    3.2.1): each side's distances are divided by their mean over the pairs, the Huber loss turns linear at 1. The
    student's mean has a gradient. Where all rows of a side are equal, its distances are 0.

    The partners are the rows of this call, so the loss of a row depends on its micro-batch and a batch that is split
    does not sum. Fewer than 2 rows give 0. Raises ValueError when the numbers of rows differ.
    """
    rows = _check_rows(teacher_NV, student_NW)
    if rows < 2:
        return _zero(student_NW)
    with torch.autocast(student_NW.device.type, enabled=False):
        teacher_NN = _normalised_distances(teacher_NV.detach())
        student_NN = _normalised_distances(student_NW)
        return F.huber_loss(student_NN, teacher_NN, reduction="sum", delta=1.0) / (rows - 1)


def rkd_angle_sum(teacher_NV: torch.Tensor, student_NW: torch.Tensor) -> torch.Tensor:
    """Sum over rows of the mean, over the pairs of other rows, of the Huber loss between the cosines of their angle.

    The row is the angle's vertex. Divided by N it is the mean over ordered triples of different rows in RKD (Park et
    al. 2019, arXiv:1904.05068, section 3.2.2); the Huber loss turns linear at 1. Two rows in one place have no
    direction: the cosines with it are 0, without a gradient.

    The partners are the rows of this call, so the loss of a row depends on its micro-batch and a batch that is split
    does not sum. Fewer than 3 rows give 0. Time grows as N^2 (N + W). Raises ValueError when the numbers of rows
    differ.
    """
    if _check_rows(teacher_NV, student_NW) < 3:
        return _zero(student_NW)
    return _AngleHuber.apply(student_NW, teacher_NV.detach())


class _RelationKL(torch.autograd.Function):
    """The loss and its gradient, some relation heads at a time."""

    @staticmethod
    def forward(
        ctx: Any, student_NLW: torch.Tensor, teacher_NLV: torch.Tensor, real_NL: torch.Tensor, heads: int
    ) -> torch.Tensor:
        rows, length = real_NL.shape
        weight_N1L1 = (real_NL / (heads * token_counts(real_NL))[:, None])[:, None, :, None]
        needs_gradient = ctx.needs_input_grad[0]
        gradient_NLW = torch.empty_like(student_NLW, dtype=torch.float32) if needs_gradient else None
        loss_sum = torch.zeros((), device=student_NLW.device)
        # Four tensors of scores live at a time; together they are held to about half the size of the inputs.
        scores_per_head = max(1, 8 * rows * length * length)
        step = max(1, min(heads, (student_NLW.numel() + teacher_NLV.numel()) // scores_per_head))
        with torch.autocast(student_NLW.device.type, enabled=False):
            for first in range(0, heads, step):
                last = min(first + step, heads)
                teacher_logprobs, _ = _relations(teacher_NLV, real_NL, heads, first, last)
                student_logprobs, student_NRLD = _relations(student_NLW, real_NL, heads, first, last)
                teacher_probs = teacher_logprobs.exp()
                terms = teacher_logprobs.sub_(student_logprobs).mul_(teacher_probs)
                loss_sum += (terms.sum(dim=-1, keepdim=True) * weight_N1L1).sum()
                if gradient_NLW is None:
                    continue
                # d KL / d score = q - p; a score is the product of two tokens, so that it comes once for each.
                slopes_NRLL = student_logprobs.exp_().sub_(teacher_probs).mul_(weight_N1L1)
                torch.add(slopes_NRLL, slopes_NRLL.transpose(2, 3), out=terms)
                depth = student_NRLD.shape[3]
                gradient_NRLD = torch.matmul(terms, student_NRLD).mul_(depth**-0.5)
                gradient_NLW[..., first * depth : last * depth] = gradient_NRLD.transpose(1, 2).flatten(2)
        if gradient_NLW is not None:
            ctx.save_for_backward(gradient_NLW)
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (gradient_NLW,) = ctx.saved_tensors
        return gradient_NLW * grads[0], None, None, None


def _relations(
    vectors_NLW: torch.Tensor, real_NL: torch.Tensor, heads: int, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of relation heads first to last (NRLL), and the vectors that they are made of (NRLD)."""
    depth = vectors_NLW.shape[2] // heads
    split_NRLD = vectors_NLW[..., first * depth : last * depth].unflatten(2, (last - first, depth)).transpose(1, 2)
    # Copied once, in the order that the products need: a transposed view would be copied for each of them.
    vectors_NRLD = torch.empty(split_NRLD.shape, dtype=torch.float32, device=split_NRLD.device).copy_(split_NRLD)
    vectors_NRLD.masked_fill_(~real_NL[:, None, :, None], 0.0).clamp_(-LARGEST_COMPONENT, LARGEST_COMPONENT)
    scores_NRLL = torch.matmul(vectors_NRLD, vectors_NRLD.mT).mul_(depth**-0.5)
    scores_NRLL.masked_fill_(~real_NL[:, None, None, :], PADDED_SCORE)
    return F.log_softmax(scores_NRLL, dim=-1), vectors_NRLD


class _AngleHuber(torch.autograd.Function):
    """The loss and its gradient, some vertices (C) at a time."""

    @staticmethod
    def forward(ctx: Any, student_NW: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
        rows = student_NW.shape[0]
        needs_gradient = ctx.needs_input_grad[0]
        student, scale = _scaled(student_NW)
        teacher, _ = _scaled(teacher_NV)
        gradient_NW = torch.zeros_like(student)
        loss_sum = torch.zeros((), device=student_NW.device)
        weight = 1 / ((rows - 1) * (rows - 2))
        step = max(1, MAX_DIRECTION_ELEMENTS // (rows * max(rows, student.shape[1], teacher.shape[1])))
        with torch.autocast(student_NW.device.type, enabled=False):
            for first in range(0, rows, step):
                vertices = slice(first, first + step)
                teacher_CNV, _ = _directions(teacher, vertices)
                student_CNW, norms_CN1 = _directions(student, vertices)
                difference_CNN = torch.bmm(student_CNW, student_CNW.mT)
                difference_CNN.baddbmm_(teacher_CNV, teacher_CNV.mT, alpha=-1)
                difference_CNN.diagonal(dim1=1, dim2=2).zero_()
                # Its slope is the difference cut to -1 and 1, and slope * (difference - slope / 2) the Huber loss.
                slopes_CNN = difference_CNN.clamp(-1.0, 1.0)
                loss_sum += difference_CNN.sub_(slopes_CNN, alpha=0.5).mul_(slopes_CNN).sum()
                if not needs_gradient:
                    continue
                # The cosines are symmetric, so that a direction gets each slope twice.
                pull_CNW = torch.bmm(slopes_CNN, student_CNW).mul_(2 * weight)
                along_CN1 = (pull_CNW * student_CNW).sum(dim=2, keepdim=True)
                pull_CNW.addcmul_(student_CNW, along_CN1, value=-1).mul_(_inverse(norms_CN1))
                gradient_NW += pull_CNW.sum(dim=0)
                gradient_NW[vertices] -= pull_CNW.sum(dim=1)
        ctx.save_for_backward(gradient_NW.div_(scale))
        return loss_sum * weight

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (gradient_NW,) = ctx.saved_tensors
        return gradient_NW * grads[0], None


def _directions(vectors_NW: torch.Tensor, vertices: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors from each of C vertices to all rows (CNW), 0 to one in the same place, and their lengths (CN1)."""
    difference_CNW = vectors_NW[None] - vectors_NW[vertices, None]
    norms_CN1 = torch.linalg.vector_norm(difference_CNW, dim=2, keepdim=True)
    return difference_CNW.mul_(_inverse(norms_CN1)), norms_CN1


def _inverse(values: torch.Tensor) -> torch.Tensor:
    """1 / value, and 0 for 0."""
    return torch.where(values > 0, values, torch.inf).reciprocal_()


def _normalised_distances(vectors_NW: torch.Tensor) -> torch.Tensor:
    """Distances between rows divided by their mean over the pairs of different rows (NN, 0 on the diagonal)."""
    vectors_NW, _ = _scaled(vectors_NW)
    # Not by matrix products: |a|^2 + |b|^2 - 2ab loses the distance of vectors that are close for their length. The
    # gradient of cdist at distance 0 is 0.
    distances_NN = torch.cdist(vectors_NW, vectors_NW, compute_mode="donot_use_mm_for_euclid_dist")
    rows = distances_NN.shape[0]
    mean = distances_NN.sum() / (rows * (rows - 1))
    return distances_NN / torch.where(mean > 0, mean, 1.0)


def _scaled(vectors_NW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors in float32 over their largest component, and that; RKD depends on no scale, and squares stay finite."""
    scale = vectors_NW.detach().abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny)
    return vectors_NW.float() / scale, scale


def _zero(student_NW: torch.Tensor) -> torch.Tensor:
    """0 with a gradient of zeros, whatever the student holds."""
    return student_NW[:0].float().sum()


def _check_rows(teacher_NV: torch.Tensor, student_NW: torch.Tensor) -> int:
    if teacher_NV.dim() != 2 or student_NW.dim() != 2 or teacher_NV.shape[0] != student_NW.shape[0]:
        raise ValueError(
            f"teacher {tuple(teacher_NV.shape)} and student {tuple(student_NW.shape)}: expected one vector for each of"
            " the same rows"
        )
    return student_NW.shape[0]
