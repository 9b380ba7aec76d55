"""A loss whose gradient is known in closed form, handed to autograd beside its value.

Through autograd a Jensen-Shannon divergence keeps about ten tensors of the logits' size until the backward pass; its
gradient in closed form is one. The losses of this folder that are not a plain forward KL are written that way.

Shapes: N rows, K classes.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_logits_NK: torch.Tensor, loss_sum: torch.Tensor, gradient_NK: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(gradient_NK)
        ctx.dtype = student_logits_NK.dtype
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outer: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        (gradient_NK,) = ctx.saved_tensors
        return (outer[0] * gradient_NK).to(ctx.dtype), None, None


def with_gradient(student_logits_NK: torch.Tensor, loss_sum: torch.Tensor, gradient_NK: torch.Tensor) -> torch.Tensor:
    """The loss as a function of the student's logits with this gradient; there is no second derivative.

    loss_sum and gradient_NK are float32 and made without autograd. The gradient stays float32 until it has been
    multiplied by what comes from above (float16's loss scale), and takes the logits' dtype then.
    """
    return _KnownGradient.apply(student_logits_NK, loss_sum, gradient_NK)  # pyright: ignore[reportReturnType]
