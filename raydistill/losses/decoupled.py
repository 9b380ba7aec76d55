"""Decoupled distillation: the target class against the rest, and the rest among themselves, with a weight each.

Shapes: N rows, K classes.
"""

import torch
import torch.nn.functional as F

from raydistill.losses.gradient import with_gradient
from raydistill.losses.response import IGNORED_LABEL, check_pair, check_temperature, teacher_labels

# Its exponential is 0 and differences with it stay finite, so that the target's place never makes inf - inf.
NOTHING = torch.finfo(torch.float32).min


def decoupled_kl_sum(
    teacher_logits_NK: torch.Tensor,
    student_logits_NK: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    temperature: float,
    target_weight: float,
    non_target_weight: float,
) -> torch.Tensor:
    """Sum over rows of target_weight TCKD + non_target_weight NCKD in nats, times temperature squared.

    DKD, Zhao et al. 2022, arXiv:2203.08679, section 3, equation 7; the weights are the paper's alpha and beta.
    TCKD is KL(teacher || student) of the two outcomes "the label" and "another class"; NCKD is KL(teacher || student)
    of the other classes, each side renormalised without the label. With the teacher's probability p of the label,
    KL = TCKD + (1 - p) NCKD, whatever class is taken for the label. With two classes NCKD is 0.
    A row whose label is -100 has no target of its own: the teacher's most likely class takes its place, so that the
    row takes part with the same weights.
    Computed in float32, the square as in forward_kl_sum. Raises ValueError on a shape mismatch, a temperature that is
    not positive or a negative weight.
    """
    check_pair(teacher_logits_NK, student_logits_NK)
    check_temperature(temperature)
    if student_logits_NK.shape[:1] != labels_N.shape:
        raise ValueError(f"{student_logits_NK.shape[0]} rows of logits but labels of shape {tuple(labels_N.shape)}")
    if not (target_weight >= 0 and non_target_weight >= 0):
        raise ValueError(f"weights must not be negative, found {target_weight} and {non_target_weight}")
    with torch.no_grad():
        targets_N = torch.where(labels_N == IGNORED_LABEL, teacher_labels(teacher_logits_NK), labels_N)
        targets_N1 = targets_N.unsqueeze(-1)
        teacher_odds_N1, teacher_rest_NK = _split(teacher_logits_NK, targets_N1, temperature)
        student_odds_N1, student_rest_NK = _split(student_logits_NK, targets_N1, temperature)

        target_N1 = torch.zeros_like(teacher_odds_N1)
        for sign in (1, -1):
            teacher_N1, student_N1 = F.logsigmoid(sign * teacher_odds_N1), F.logsigmoid(sign * student_odds_N1)
            target_N1 += teacher_N1.exp() * (teacher_N1 - student_N1)
        # d TCKD / d odds.
        slope_N1 = target_weight * (torch.sigmoid(student_odds_N1) - torch.sigmoid(teacher_odds_N1))

        ratio_NK = teacher_rest_NK - student_rest_NK
        teacher_probs_NK = teacher_rest_NK.exp_()
        non_target = ratio_NK.mul_(teacher_probs_NK).sum()
        del ratio_NK
        loss = (target_weight * target_N1.sum() + non_target_weight * non_target) * temperature**2
        # odds = z_target - logsumexp of the others, whose derivative by another class's logit is -student_probs.
        gradient_NK = student_rest_NK.exp_().mul_(non_target_weight - slope_N1)
        gradient_NK.sub_(teacher_probs_NK, alpha=non_target_weight).scatter_(-1, targets_N1, slope_N1)
        gradient_NK.mul_(temperature)
    return with_gradient(student_logits_NK, loss, gradient_NK)


def _split(logits_NK: torch.Tensor, targets_N1: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The log odds of the target against all others, and the others' log-probabilities among themselves."""
    scaled_NK = logits_NK.float() / temperature
    target_N1 = scaled_NK.gather(-1, targets_N1)
    scaled_NK.scatter_(-1, targets_N1, NOTHING)
    # Less the largest before the logarithm of the sum: beside logits of -3000 that would be known to 1e-4 only.
    largest_N1 = scaled_NK.amax(dim=-1, keepdim=True)
    rest_N1 = scaled_NK.sub_(largest_N1).logsumexp(dim=-1, keepdim=True)
    return target_N1 - largest_N1 - rest_N1, scaled_NK.sub_(rest_N1)
