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
# The angles are computed for as many vertices at a time as keep eight float32 tensors of their cosines, which are three
# in float64 and what is made on the way, as small as the inputs.
ANGLE_TENSORS = 8.0


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
        # And the vectors are copied: half of the heads at most, so that the copies are half the inputs at most.
        most = -(-heads // 2)
        step = max(1, min(most, (student_NLW.numel() + teacher_NLV.numel()) // scores_per_head))
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
    """The loss and its gradient, some vertices (C) at a time, from the squared distances between rows (NN) alone.

    A cosine is (a_j + a_k - d_jk) / (2 sqrt(a_j a_k)), a the squared distances from the vertex and d those between the
    others. In float64, where what cancels in it is below float32's own rounding of the rows.
    """

    @staticmethod
    def forward(ctx: Any, student_NW: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
        rows = student_NW.shape[0]
        needs_gradient = ctx.needs_input_grad[0]
        # Both sides in one tensor (2NN), teacher first: the operations are small, and half as many so.
        squares_2NN = torch.stack([_squared_distances(teacher_NV), _squared_distances(student_NW)])
        slopes_NN = torch.zeros_like(squares_2NN[0])
        loss_sum = torch.zeros((), device=student_NW.device, dtype=torch.float64)
        step = max(1, int((student_NW.numel() + teacher_NV.numel()) / (ANGLE_TENSORS * rows**2)))
        for first in range(0, rows, step):
            vertices = slice(first, first + step)
            (teacher_CNN, student_CNN), (_, inverse_CN) = _cosines(squares_2NN, vertices)
            difference_CNN = torch.sub(student_CNN, teacher_CNN, out=teacher_CNN)
            difference_CNN.diagonal(dim1=1, dim2=2).zero_()
            # Its slope is the difference cut to -1 and 1, and slope * (difference - slope / 2) the Huber loss.
            huber_CNN = difference_CNN.clamp(-1.0, 1.0)
            loss_sum += difference_CNN.sub_(huber_CNN, alpha=0.5).mul_(huber_CNN).sum()
            if needs_gradient:
                along_CN = student_CNN.mul_(huber_CNN).sum(dim=2).mul_(inverse_CN.square())
                huber_CNN.mul_(inverse_CN[:, :, None]).mul_(inverse_CN[:, None, :])
                slopes_NN.sub_(huber_CNN.sum(dim=0), alpha=0.5)
                slopes_NN[vertices] += huber_CNN.sum(dim=2).sub_(along_CN)
        del squares_2NN
        weight = 1 / ((rows - 1) * (rows - 2))
        if needs_gradient:
            ctx.save_for_backward(_through_distances(student_NW, slopes_NN.mul_(weight)))
        return (loss_sum * weight).float()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (gradient_NW,) = ctx.saved_tensors
        return gradient_NW * grads[0], None


def _columns(vectors_NW: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The columns in eight parts, so that float64 copies stay smaller than the vectors."""
    return vectors_NW.split(max(1, -(-vectors_NW.shape[1] // 8)), dim=1)


def _squared_distances(vectors_NW: torch.Tensor) -> torch.Tensor:
    """Between all rows, in float64 and by differences: 0 for rows that are equal. Shape: NN."""
    rows = vectors_NW.shape[0]
    total_NN = vectors_NW.new_zeros((rows, rows), dtype=torch.float64)
    for part in _columns(vectors_NW):
        part = part.double()
        total_NN += torch.cdist(part, part, compute_mode="donot_use_mm_for_euclid_dist").square_()
    return total_NN


def _cosines(squares_2NN: torch.Tensor, vertices: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of the angles between rows seen from each of C vertices (2CNN), and 1 / distance from it (2CN).

    0 where a row is in the vertex's place; the cosines between a row and itself mean nothing.
    """
    legs_2CN = squares_2NN[:, vertices]
    inverse_2CN = _inverse(legs_2CN.sqrt())
    cosines_2CNN = (legs_2CN[..., None] + legs_2CN[..., None, :]).sub_(squares_2NN[:, None])
    half_2CN = 0.5 * inverse_2CN
    return cosines_2CNN.mul_(half_2CN[..., None]).mul_(inverse_2CN[..., None, :]), inverse_2CN


def _through_distances(vectors_NW: torch.Tensor, slopes_NN: torch.Tensor) -> torch.Tensor:
    """The gradient by the vectors, float32, from that by their squared distances."""
    slopes_NN = slopes_NN + slopes_NN.mT
    sums_N1 = slopes_NN.sum(dim=1, keepdim=True)
    gradient_NW = torch.empty_like(vectors_NW, dtype=torch.float32)
    for part, target in zip(_columns(vectors_NW), _columns(gradient_NW), strict=True):
        # From the mean, because only differences count and those of vectors far from 0 would cancel.
        centred = part.double() - part.double().mean(dim=0)
        target.copy_(torch.addmm(sums_N1 * centred, slopes_NN, centred, alpha=-1).mul_(2.0))
    return gradient_NW


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
