"""Losses on a model's outputs. Each is a sum over rows in float32; the caller divides once by the global count.

The teacher's logits are constants: no gradient reaches them. Logits are finite; float16's largest ones (65504) are
safe, an infinite or NaN logit gives a loss that is not finite, which stops the run.

Shapes: N rows, K classes.
"""

import math

import torch
import torch.nn.functional as F

from raydistill.losses.gradient import with_gradient

IGNORED_LABEL = -100


def forward_kl_sum(
    teacher_logits_NK: torch.Tensor, student_logits_NK: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """Sum over rows of KL(teacher || student) in nats at this temperature, times temperature squared.

    The square keeps the gradient's size as the temperature changes (Hinton et al. 2015, arXiv:1503.02531, section 2).
    Computed in float32. Raises ValueError on a shape mismatch or a temperature that is not positive.
    """
    check_pair(teacher_logits_NK, student_logits_NK)
    check_temperature(temperature)
    teacher_logprobs_NK = F.log_softmax(teacher_logits_NK.detach().float() / temperature, dim=-1)
    student_logprobs_NK = F.log_softmax(student_logits_NK.float() / temperature, dim=-1)
    # What F.kl_div computes with log_target, bit for bit, without two of its five tensors.
    ratio_NK = teacher_logprobs_NK - student_logprobs_NK
    return ratio_NK.mul_(teacher_logprobs_NK.exp_()).sum() * temperature**2


def reverse_kl_sum(
    teacher_logits_NK: torch.Tensor, student_logits_NK: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """Sum over rows of KL(student || teacher) in nats at this temperature, times temperature squared.

    The mode-seeking direction (MiniLLM, Gu et al. 2023, arXiv:2306.08543, section 2.1), here exact over all classes
    and not estimated from samples. At high temperatures it equals forward KL, so it takes the same square.
    Computed in float32. Raises ValueError on a shape mismatch or a temperature that is not positive.
    """
    with torch.no_grad():
        teacher_logprobs_NK, student_logprobs_NK = _logprobs(teacher_logits_NK, student_logits_NK, temperature)
        ratio_NK = torch.sub(student_logprobs_NK, teacher_logprobs_NK, out=teacher_logprobs_NK)
        student_probs_NK = student_logprobs_NK.exp_()
        slope_NK = ratio_NK.mul_(student_probs_NK)
        loss = slope_NK.sum() * temperature**2
        gradient_NK = _through_softmax_(slope_NK, student_probs_NK).mul_(temperature)
    return with_gradient(student_logits_NK, loss, gradient_NK)


def generalised_jsd_sum(
    teacher_logits_NK: torch.Tensor, student_logits_NK: torch.Tensor, *, temperature: float, beta: float
) -> torch.Tensor:
    """Sum over rows of beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student.

    In nats at this temperature, times temperature squared: at high temperatures it is beta (1 - beta) forward KL.
    GKD, Agarwal et al. 2023, arXiv:2306.13649, section 2, equation 1; beta 0.5 is the Jensen-Shannon divergence.
    The definition is 0 for every student at beta 0 and at beta 1. Its limits divided by beta and by 1 - beta are
    meant there, as the paper and TRL name them: beta 0 is forward_kl_sum, beta 1 is reverse_kl_sum. So the loss jumps
    at the ends: for small beta it is near beta times forward KL.
    Computed in float32. Raises ValueError on a shape mismatch, a temperature that is not positive, a beta outside
    [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be from 0 to 1, found {beta}")
    if beta == 0:
        return forward_kl_sum(teacher_logits_NK, student_logits_NK, temperature=temperature)
    if beta == 1:
        return reverse_kl_sum(teacher_logits_NK, student_logits_NK, temperature=temperature)
    with torch.no_grad():
        teacher_logprobs_NK, student_logprobs_NK = _logprobs(teacher_logits_NK, student_logits_NK, temperature)
        mixture_logprobs_NK = mixture(teacher_logprobs_NK, student_logprobs_NK, beta)
        teacher_terms_NK = (teacher_logprobs_NK - mixture_logprobs_NK).mul_(teacher_logprobs_NK.exp_())
        loss = beta * teacher_terms_NK.sum()
        del teacher_logprobs_NK, teacher_terms_NK
        ratio_NK = torch.sub(student_logprobs_NK, mixture_logprobs_NK, out=mixture_logprobs_NK)
        student_probs_NK = student_logprobs_NK.exp_()
        # The derivatives by the mixture cancel: d loss / d log student is (1 - beta) student log(student / m).
        slope_NK = ratio_NK.mul_(student_probs_NK)
        loss = (loss + (1 - beta) * slope_NK.sum()) * temperature**2
        gradient_NK = _through_softmax_(slope_NK, student_probs_NK).mul_((1 - beta) * temperature)
    return with_gradient(student_logits_NK, loss, gradient_NK)


def skew_forward_kl_sum(
    teacher_logits_NK: torch.Tensor, student_logits_NK: torch.Tensor, *, temperature: float, skew: float
) -> torch.Tensor:
    """Sum over rows of KL(teacher || skew teacher + (1 - skew) student) in nats, times temperature squared.

    DistiLLM, Ko et al. 2024, arXiv:2402.03898, section 3.1, where skew is alpha. Skew 0 is forward KL; the gradient
    is bounded for skew > 0, because the mixture never falls below skew times the teacher. At high temperatures it is
    (1 - skew)^2 forward KL, hence the square.
    Computed in float32. Raises ValueError on a shape mismatch, a temperature that is not positive, a skew outside
    [0, 1) (at 1 the loss is 0 for every student).
    """
    _check_skew(skew)
    if skew == 0:
        return forward_kl_sum(teacher_logits_NK, student_logits_NK, temperature=temperature)
    with torch.no_grad():
        teacher_logprobs_NK, student_logprobs_NK = _logprobs(teacher_logits_NK, student_logits_NK, temperature)
        mixture_logprobs_NK = mixture(teacher_logprobs_NK, student_logprobs_NK, skew)
        ratio_NK = torch.sub(teacher_logprobs_NK, mixture_logprobs_NK, out=mixture_logprobs_NK)
        loss = teacher_logprobs_NK.exp_().mul_(ratio_NK).sum() * temperature**2
        del teacher_logprobs_NK
        # d loss / d log student is -(1 - skew) teacher student / mixture.
        slope_NK = ratio_NK.add_(student_logprobs_NK).exp_()
        gradient_NK = _through_softmax_(slope_NK, student_logprobs_NK.exp_()).mul_(-(1 - skew) * temperature)
    return with_gradient(student_logits_NK, loss, gradient_NK)


def skew_reverse_kl_sum(
    teacher_logits_NK: torch.Tensor, student_logits_NK: torch.Tensor, *, temperature: float, skew: float
) -> torch.Tensor:
    """Sum over rows of KL(student || (1 - skew) teacher + skew student) in nats, times temperature squared.

    DistiLLM, Ko et al. 2024, arXiv:2402.03898, section 3.1, where skew is alpha. Skew 0 is reverse KL. At high
    temperatures it is (1 - skew)^2 forward KL, hence the square.
    Computed in float32. Raises ValueError on a shape mismatch, a temperature that is not positive, a skew outside
    [0, 1) (at 1 the loss is 0 for every student).
    """
    _check_skew(skew)
    if skew == 0:
        return reverse_kl_sum(teacher_logits_NK, student_logits_NK, temperature=temperature)
    with torch.no_grad():
        teacher_logprobs_NK, student_logprobs_NK = _logprobs(teacher_logits_NK, student_logits_NK, temperature)
        mixture_logprobs_NK = mixture(teacher_logprobs_NK, student_logprobs_NK, 1 - skew)
        del teacher_logprobs_NK
        ratio_NK = torch.sub(student_logprobs_NK, mixture_logprobs_NK, out=mixture_logprobs_NK)
        student_probs_NK = student_logprobs_NK.exp_()
        loss = (student_probs_NK * ratio_NK).sum() * temperature**2
        # d loss / d log student is student (log(student / mixture) + 1 - skew student / mixture); the softmax drops 1.
        slope_NK = ratio_NK.sub_(ratio_NK.exp().mul_(skew)).mul_(student_probs_NK)
        gradient_NK = _through_softmax_(slope_NK, student_probs_NK).mul_(temperature)
    return with_gradient(student_logits_NK, loss, gradient_NK)


def total_variation_sum(
    teacher_logits_NK: torch.Tensor, student_logits_NK: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """Sum over rows of half the sum over classes of |teacher - student| at this temperature, times the temperature.

    From 0 to temperature per row (Wen et al. 2023, arXiv:2307.15190, section 3). The distance is of first order in
    the difference of the logits, so the temperature itself, and not its square, keeps the gradient's size. Where a
    class has the same probability on both sides the gradient takes 0 from the interval of subgradients.
    Computed in float32. Raises ValueError on a shape mismatch or a temperature that is not positive.
    """
    check_pair(teacher_logits_NK, student_logits_NK)
    check_temperature(temperature)
    teacher_probs_NK = F.softmax(teacher_logits_NK.detach().float() / temperature, dim=-1)
    student_probs_NK = F.softmax(student_logits_NK.float() / temperature, dim=-1)
    return (student_probs_NK - teacher_probs_NK).abs().sum() * (temperature / 2)


def logit_mse_sum(teacher_logits_NK: torch.Tensor, student_logits_NK: torch.Tensor) -> torch.Tensor:
    """Sum over rows of the mean over classes of (student logit - teacher logit)^2, without a temperature.

    Divided by the rows it is F.mse_loss. Matching logits is what forward KL becomes at high temperatures, where it is
    half of this for centred rows (Hinton et al. 2015, arXiv:1503.02531, section 2.1; Kim et al. 2021,
    arXiv:2105.08919). Adding a constant to a row's logits changes this loss, unlike the others: standardise to
    ignore it. Computed in float32. Raises ValueError on a shape mismatch.
    """
    check_pair(teacher_logits_NK, student_logits_NK)
    squares = F.mse_loss(student_logits_NK.float(), teacher_logits_NK.detach().float(), reduction="sum")
    return squares / student_logits_NK.shape[-1]


def cross_entropy_sum(
    student_logits_NK: torch.Tensor, labels_N: torch.Tensor, *, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Sum over rows of -log student(label) in nats, in float32; rows with the label -100 add nothing.

    With label smoothing the target is (1 - label_smoothing) on the label plus label_smoothing / K on every class, the
    label's included (Szegedy et al. 2016, arXiv:1512.00567, section 7).
    Raises ValueError on a shape mismatch or a label smoothing outside [0, 1].
    """
    if student_logits_NK.shape[:1] != labels_N.shape:
        raise ValueError(f"{student_logits_NK.shape[0]} rows of logits but labels of shape {tuple(labels_N.shape)}")
    check_label_smoothing(label_smoothing)
    return F.cross_entropy(
        student_logits_NK.float(),
        labels_N,
        reduction="sum",
        ignore_index=IGNORED_LABEL,
        label_smoothing=label_smoothing,
    )


def teacher_labels(teacher_logits_NK: torch.Tensor) -> torch.Tensor:
    """The teacher's most likely class of each row, int64, the first one where several are equal: a hard target."""
    return teacher_logits_NK.argmax(dim=-1)


def mixture(first_logprobs: torch.Tensor, second_logprobs: torch.Tensor, weight: float) -> torch.Tensor:
    """log(weight e^first + (1 - weight) e^second) elementwise for 0 < weight < 1, one tensor allocated."""
    mixed = first_logprobs + (math.log(weight) - math.log1p(-weight))
    return torch.logaddexp(mixed, second_logprobs, out=mixed).add_(math.log1p(-weight))


def check_pair(teacher_logits_NK: torch.Tensor, student_logits_NK: torch.Tensor) -> None:
    """Raises ValueError unless both sides have one shape."""
    if teacher_logits_NK.shape != student_logits_NK.shape:
        raise ValueError(
            f"teacher {tuple(teacher_logits_NK.shape)} and student {tuple(student_logits_NK.shape)} differ"
        )


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless the temperature is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, found {temperature}")


def check_label_smoothing(label_smoothing: float) -> None:
    """Raises ValueError unless the label smoothing is a share."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, found {label_smoothing}")


def _check_skew(skew: float) -> None:
    if not 0 <= skew < 1:
        raise ValueError(f"skew must be at least 0 and below 1, found {skew}")


def _logprobs(
    teacher_logits_NK: torch.Tensor, student_logits_NK: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides' log-probabilities at a temperature, new float32 tensors."""
    check_pair(teacher_logits_NK, student_logits_NK)
    check_temperature(temperature)
    return (
        F.log_softmax(teacher_logits_NK.float() / temperature, dim=-1),
        F.log_softmax(student_logits_NK.float() / temperature, dim=-1),
    )


def _through_softmax_(slope_NK: torch.Tensor, probs_NK: torch.Tensor) -> torch.Tensor:
    """d loss / d (logits / temperature) from d loss / d log probability, in place of the latter."""
    return slope_NK.addcmul_(probs_NK, slope_NK.sum(dim=-1, keepdim=True), value=-1)
