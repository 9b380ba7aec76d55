"""Losses for rows that may have several classes or none: each class is a question of its own, answered by a sigmoid.

Each loss is a sum over rows and over the K classes, in float32: a row's loss grows with K, and a class's gradient
does not depend on how many other classes there are. The caller divides once by the global count of rows, not by K.
The teacher's logits are constants: no gradient reaches them. Logits are finite.

Shapes: N rows, K classes.
"""

import math

import torch
import torch.nn.functional as F

from raydistill.losses.gradient import with_gradient
from raydistill.losses.response import (
    IGNORED_LABEL,
    check_label_smoothing,
    check_pair,
    check_temperature,
)


def binary_cross_entropy_sum(
    student_logits_NK: torch.Tensor, labels_NK: torch.Tensor, *, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Sum over rows and classes of -log student(label) in nats, in float32.

    labels_NK is 1 where the row has the class, 0 where not, -100 where that is unknown, which adds nothing. With label
    smoothing a label of 1 becomes 1 - label_smoothing / 2 and a label of 0 label_smoothing / 2: cross_entropy_sum's
    smoothing for the two outcomes of a class. Raises ValueError on a shape mismatch or a label smoothing outside
    [0, 1].
    """
    if student_logits_NK.shape != labels_NK.shape:
        raise ValueError(f"logits {tuple(student_logits_NK.shape)} and labels {tuple(labels_NK.shape)} differ")
    check_label_smoothing(label_smoothing)
    with torch.no_grad():
        logits_NK, targets_NK = student_logits_NK.float(), labels_NK.float()
        if label_smoothing > 0:
            targets_NK = (targets_NK * (1 - label_smoothing)).add_(label_smoothing / 2)
        known_NK = (labels_NK != IGNORED_LABEL).float()
        # log(1 + e^-|z|) + max(z, 0) - target z: no two terms of z's size cancel, as they do in
        # F.binary_cross_entropy_with_logits, which is off by a hundredth for a class rightly refused at z = -10.
        terms_NK = logits_NK.abs().neg_().exp_().log1p_()
        terms_NK.add_(logits_NK.clamp(min=0).addcmul_(targets_NK, logits_NK, value=-1))
        loss = terms_NK.mul_(known_NK).sum()
        del terms_NK
        gradient_NK = torch.sigmoid(logits_NK).sub_(targets_NK).mul_(known_NK)
    return with_gradient(student_logits_NK, loss, gradient_NK)


def binary_kl_sum(
    teacher_logits_NK: torch.Tensor, student_logits_NK: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """Sum over rows and classes of KL(teacher || student) of the class's two outcomes, in nats, times temperature^2.

    A class's probability is sigmoid(logit / temperature), which is the softmax of (logit, 0), so this is forward KL
    with two classes and takes its square (Hinton et al. 2015, arXiv:1503.02531, section 2). Every class counts,
    whether its label is known or not.
    Computed in float32. Raises ValueError on a shape mismatch or a temperature that is not positive.
    """
    check_pair(teacher_logits_NK, student_logits_NK)
    check_temperature(temperature)
    with torch.no_grad():
        teacher_NK, student_NK = teacher_logits_NK.float() / temperature, student_logits_NK.float() / temperature
        loss = _kl_of_outcomes(teacher_NK, student_NK) * temperature**2
        gradient_NK = student_NK.sigmoid_().sub_(teacher_NK.sigmoid_()).mul_(temperature)
    return with_gradient(student_logits_NK, loss, gradient_NK)


def binary_reverse_kl_sum(
    teacher_logits_NK: torch.Tensor, student_logits_NK: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """Sum over rows and classes of KL(student || teacher) of the class's two outcomes, in nats, times temperature^2.

    As binary_kl_sum, in the direction of reverse_kl_sum. Computed in float32. Raises ValueError on a shape mismatch or
    a temperature that is not positive.
    """
    check_pair(teacher_logits_NK, student_logits_NK)
    check_temperature(temperature)
    with torch.no_grad():
        teacher_NK, student_NK = teacher_logits_NK.float() / temperature, student_logits_NK.float() / temperature
        loss = _kl_of_outcomes(student_NK, teacher_NK) * temperature**2
        gradient_NK = torch.sub(student_NK, teacher_NK, out=teacher_NK).mul_(_variance_(student_NK)).mul_(temperature)
    return with_gradient(student_logits_NK, loss, gradient_NK)


def binary_jsd_sum(
    teacher_logits_NK: torch.Tensor, student_logits_NK: torch.Tensor, *, temperature: float, beta: float
) -> torch.Tensor:
    """Sum over rows and classes of generalised_jsd_sum's divergence of the class's two outcomes, times temperature^2.

    beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student, as GKD defines it
    (arXiv:2306.13649, equation 1), in nats; beta 0 is binary_kl_sum, beta 1 is binary_reverse_kl_sum.
    Computed in float32. Raises ValueError on a shape mismatch, a temperature that is not positive, a beta outside
    [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be from 0 to 1, found {beta}")
    if beta == 0:
        return binary_kl_sum(teacher_logits_NK, student_logits_NK, temperature=temperature)
    if beta == 1:
        return binary_reverse_kl_sum(teacher_logits_NK, student_logits_NK, temperature=temperature)
    check_pair(teacher_logits_NK, student_logits_NK)
    check_temperature(temperature)
    with torch.no_grad():
        mixture_NK = _mixture(teacher_logits_NK.float() / temperature, student_logits_NK.float() / temperature, beta)
        loss = beta * _kl_of_outcomes(teacher_logits_NK.float() / temperature, mixture_NK)
        student_NK = student_logits_NK.float() / temperature
        loss = (loss + (1 - beta) * _kl_of_outcomes(student_NK, mixture_NK)) * temperature**2
        # The derivatives by the mixture cancel, as in generalised_jsd_sum.
        gradient_NK = torch.sub(student_NK, mixture_NK, out=mixture_NK).mul_(_variance_(student_NK))
        gradient_NK.mul_((1 - beta) * temperature)
    return with_gradient(student_logits_NK, loss, gradient_NK)


def _kl_of_outcomes(first_NK: torch.Tensor, second_NK: torch.Tensor) -> torch.Tensor:
    """Sum of KL(sigmoid(first) || sigmoid(second)); both are negated in place and negated back."""
    present = _kl_of_absence(first_NK.neg_(), second_NK.neg_())
    return present + _kl_of_absence(first_NK.neg_(), second_NK.neg_())


def _kl_of_absence(first_NK: torch.Tensor, second_NK: torch.Tensor) -> torch.Tensor:
    """Sum of P log(P / Q) with P = 1 - sigmoid(first), Q = 1 - sigmoid(second): one outcome's share of the KL."""
    # log(1 - sigmoid(z)) is -softplus(z). Each outcome for itself, so that no numbers of z's size cancel.
    terms_NK = F.softplus(second_NK).sub_(F.softplus(first_NK))
    return terms_NK.mul_(first_NK.neg().sigmoid_()).sum()


def _mixture(first_NK: torch.Tensor, second_NK: torch.Tensor, weight: float) -> torch.Tensor:
    """The logit of weight sigmoid(first) + (1 - weight) sigmoid(second), from logits alone."""
    # The mixture's odds are a mean of both sides' odds, weighted by the odds weight (1 + e^second) : (1 + e^first).
    odds_NK = F.softplus(second_NK).sub_(F.softplus(first_NK)).add_(math.log(weight) - math.log1p(-weight))
    mixed_NK = first_NK + odds_NK
    torch.logaddexp(mixed_NK, second_NK, out=mixed_NK)
    return mixed_NK.sub_(torch.logaddexp(odds_NK, odds_NK.new_zeros(()), out=odds_NK))


def _variance_(logits_NK: torch.Tensor) -> torch.Tensor:
    """sigmoid(z) (1 - sigmoid(z)), in place."""
    return logits_NK.neg().sigmoid_().mul_(logits_NK.sigmoid_())
