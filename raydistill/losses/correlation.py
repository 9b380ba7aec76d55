"""Distillation by correlation: the student ranks as the teacher does, on whatever scale.

Shapes: N rows, K classes.
"""

import torch
import torch.nn.functional as F

from raydistill.losses.gradient import with_gradient
from raydistill.losses.response import check_pair, check_temperature

# A row or column of probabilities whose deviation is below this share of its size is a constant: float32 carries
# 6e-8 of each value, so that a correlation below it would be one of rounding errors.
CONSTANT = 1e-5


def dist_sum(
    teacher_logits_NK: torch.Tensor,
    student_logits_NK: torch.Tensor,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
) -> torch.Tensor:
    """N times the loss of DIST: inter_weight sum_n d(row n) + intra_weight N / K sum_k d(column k).

    Here d is 1 - Pearson's correlation of the teacher's probabilities with the student's at this temperature, from 0
    to 2: of a row over the classes (inter-class) and of a class over the rows (intra-class); Huang et al. 2022,
    arXiv:2205.10536, equations 8 and 9, the weights being the paper's beta and gamma. The paper takes means over the
    N rows and the K classes, so the sum divided by the rows is its loss, and a training step over several
    micro-batches takes their mean weighted by their rows. The inter-class term is a sum over rows like every other
    loss. The intra-class term is not: it correlates within the rows of one call, so it depends on the micro-batch, is
    noisy for a small one, and says nothing for one row.
    No power of the temperature is applied, because a correlation ignores scale and its gradient keeps its size
    without one (the authors' code multiplies by temperature squared: put it into the weights to have theirs).
    Where the teacher's side is constant (one row in the batch, uniform probabilities) there is nothing to correlate
    with and d is 0; where the student's alone is, d is 1; both with no gradient. With two classes d of a row is 0 or
    2, with no gradient.
    Computed in float32. Raises ValueError on a shape mismatch, a temperature that is not positive or a negative
    weight.
    """
    check_pair(teacher_logits_NK, student_logits_NK)
    check_temperature(temperature)
    if not (inter_weight >= 0 and intra_weight >= 0):
        raise ValueError(f"weights must not be negative, found {inter_weight} and {intra_weight}")
    rows, classes = student_logits_NK.shape
    with torch.no_grad():
        teacher_probs_NK = F.softmax(teacher_logits_NK.float() / temperature, dim=-1)
        student_probs_NK = F.softmax(student_logits_NK.float() / temperature, dim=-1)
        inter_N, slope_NK = _distances_(teacher_probs_NK.clone(), student_probs_NK, dim=1)
        intra_K, intra_slope_NK = _distances_(teacher_probs_NK, student_probs_NK, dim=0)
        per_class = intra_weight * rows / classes
        loss = inter_weight * inter_N.sum() + per_class * intra_K.sum()
        slope_NK.mul_(inter_weight).add_(intra_slope_NK, alpha=per_class)
        del teacher_probs_NK, intra_slope_NK
        # Through the softmax: probability times (slope - its mean under the probabilities), over the temperature.
        gradient_NK = slope_NK.mul_(student_probs_NK)
        gradient_NK.addcmul_(student_probs_NK, gradient_NK.sum(dim=-1, keepdim=True), value=-1).div_(temperature)
    return with_gradient(student_logits_NK, loss, gradient_NK)


def _distances_(teacher_NK: torch.Tensor, student_NK: torch.Tensor, *, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """1 - Pearson's correlation along a dimension, and its derivative by the student, made in the teacher's place."""
    student_centred_NK = student_NK - student_NK.mean(dim, keepdim=True)
    student_size, teacher_size = (torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in (student_NK, teacher_NK))
    teacher_NK.sub_(teacher_NK.mean(dim, keepdim=True))
    student_norm, teacher_norm = (
        torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in (student_centred_NK, teacher_NK)
    )
    student_constant, teacher_constant = (
        student_norm <= CONSTANT * student_size,
        teacher_norm <= CONSTANT * teacher_size,
    )
    nothing = student_constant | teacher_constant
    inverse = torch.where(nothing, 0.0, 1 / student_norm)
    student_centred_NK.mul_(inverse)
    # For unit vectors 1 - <t, s> = |t - s|^2 / 2, which is exact near 0 where 1 - <t, s> cancels.
    difference_NK = teacher_NK.mul_(torch.where(nothing, 0.0, 1 / teacher_norm)).sub_(student_centred_NK)
    distance = torch.linalg.vector_norm(difference_NK, dim=dim, keepdim=True).square() / 2
    # d(1 - <t, s>) / d student = -(t - <t, s> s) / |student|, and t - <t, s> s = (t - s) + (1 - <t, s>) s.
    slope_NK = difference_NK.addcmul_(student_centred_NK, distance).mul_(-inverse)
    distance = torch.where(teacher_constant, 0.0, torch.where(student_constant, 1.0, distance))
    return distance.squeeze(dim), slope_NK
