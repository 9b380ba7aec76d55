"""How strongly each term of an objective pulls: the size of its gradient where it meets the student.

Shapes: N rows, K classes, P parts of the objective.
"""

from collections.abc import Sequence

import torch

from raydistill.losses.objective import Objective
from raydistill.targets import TeacherTargets


def gradient_squares(
    objective: Objective,
    student_logits_NK: torch.Tensor,
    labels_N: torch.Tensor,
    teacher: TeacherTargets | None,
    *,
    student_features: Sequence[Sequence[torch.Tensor]] = (),
    mask_NL: torch.Tensor | None = None,
) -> torch.Tensor:
    """For every part, in the order of `part_names`, the sum over rows of the square of its gradient's norm. Shape: P.

    The gradient is that of the part as it enters the loss, with its weight: of the cross-entropy and the response loss
    with respect to the student's logits, of a feature term with respect to the student's features (of all its pairs of
    layers), after their projection. Divided by the rows and under a root it is a typical row's, whatever the batch.
    Computed beside the training on its own copies of logits and features, so that neither its graph nor its gradients
    are touched. The arguments are those of the objective.
    """
    logits_NK = student_logits_NK.detach().requires_grad_()
    features = tuple(tuple(f.detach().requires_grad_() for f in group) for group in student_features)
    with torch.enable_grad():
        terms = objective.terms(logits_NK, labels_N, teacher, student_features=features, mask_NL=mask_NL)
    leaves = [(logits_NK,)] * (len(terms) - len(features)) + list(features)
    return torch.stack([_square(weight, loss, group) for (weight, loss), group in zip(terms, leaves, strict=True)])


def _square(weight: float, loss: torch.Tensor, leaves: Sequence[torch.Tensor]) -> torch.Tensor:
    if not loss.requires_grad:  # no row of the batch has a label
        return torch.zeros((), device=loss.device)
    # Terms share what selects their rows where some rows are excluded.
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    squares = [gradient.float().square().sum() for gradient in gradients]
    return torch.stack(squares).sum() * weight**2
