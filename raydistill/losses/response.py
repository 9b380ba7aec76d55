"""Losses on a model's outputs. Each is a sum over rows in float32; the caller divides once by the global count.

Shapes: N rows, K classes.
"""

import torch
import torch.nn.functional as F

IGNORED_LABEL = -100


def forward_kl_sum(
    teacher_logits_NK: torch.Tensor, student_logits_NK: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """Sum over rows of KL(teacher || student) in nats at this temperature, times temperature squared.

    The square keeps the gradient's size as the temperature changes (Hinton et al. 2015, arXiv:1503.02531, section 2).
    Computed in float32. Raises ValueError on a shape mismatch or a temperature that is not positive.
    """
    if teacher_logits_NK.shape != student_logits_NK.shape:
        raise ValueError(
            f"teacher {tuple(teacher_logits_NK.shape)} and student {tuple(student_logits_NK.shape)} differ"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, found {temperature}")
    teacher_logprobs_NK = F.log_softmax(teacher_logits_NK.float() / temperature, dim=-1)
    student_logprobs_NK = F.log_softmax(student_logits_NK.float() / temperature, dim=-1)
    kl = F.kl_div(student_logprobs_NK, teacher_logprobs_NK, reduction="sum", log_target=True)
    return kl * temperature**2


def cross_entropy_sum(student_logits_NK: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Sum over rows of -log student(label) in nats, in float32; rows with the label -100 add nothing.

    Raises ValueError on a shape mismatch.
    """
    if student_logits_NK.shape[:1] != labels_N.shape:
        raise ValueError(f"{student_logits_NK.shape[0]} rows of logits but labels of shape {tuple(labels_N.shape)}")
    return F.cross_entropy(student_logits_NK.float(), labels_N, reduction="sum", ignore_index=IGNORED_LABEL)
