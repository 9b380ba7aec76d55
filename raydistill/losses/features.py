"""Losses on what a model computes on the way: hidden states, embeddings and attention maps.

Each is a sum over rows in float32, whatever the inputs' dtype. A row's own loss is a mean over its real tokens, so that
neither the padding nor the rows beside it change it; the caller divides once by the global count of rows. Embeddings
are hidden states before the first layer and go through the same functions. No gradient reaches the teacher.

The gradients are written out: autograd would keep three to four tensors of the inputs' size, these keep one or two, and
a NaN in the padding cannot reach them.

Shapes: N rows, L tokens, W the student's width or, after a projection, the teacher's, A attention heads. In an
attention map the first L is the query, the second the key.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from raydistill.losses.token_mask import real_tokens, token_counts

# A vector whose largest component is smaller has no direction: 1 / norm would not fit beside it in float32.
SMALLEST_COMPONENT = 1e-12


def hidden_mse_sum(teacher_NLW: torch.Tensor, student_NLW: torch.Tensor, mask_NL: torch.Tensor) -> torch.Tensor:
    """Sum over rows of the mean squared difference over a row's real tokens and the width.

    The hidden-state and embedding losses of TinyBERT (Jiao et al. 2020, arXiv:1909.10351, section 3.1), whose
    projection the caller applies to the student first. A row without real tokens adds 0. Raises ValueError on
    shapes that differ.
    """
    _check_same_shape(teacher_NLW, student_NLW)
    real_NL = real_tokens(mask_NL, *student_NLW.shape[:2])
    weight_N = 1 / (token_counts(real_NL) * student_NLW.shape[2])
    return _MaskedSquares.apply(student_NLW, teacher_NLW.detach(), ~real_NL[..., None], weight_N)


def hidden_cosine_sum(teacher_NLW: torch.Tensor, student_NLW: torch.Tensor, mask_NL: torch.Tensor) -> torch.Tensor:
    """Sum over rows of the mean of 1 - cos(teacher, student) over a row's real tokens; between 0 and 2 for a row.

    The cosine loss of DistilBERT (Sanh et al. 2019, arXiv:1910.01108, section 2). A token where either vector has no
    component of at least 1e-12 has no direction: its cosine is 0 and so is its gradient. A row without real tokens adds
    0. Raises ValueError on shapes that differ.
    """
    _check_same_shape(teacher_NLW, student_NLW)
    real_NL = real_tokens(mask_NL, *student_NLW.shape[:2])
    return _MaskedCosine.apply(student_NLW, teacher_NLW.detach(), real_NL, 1 / token_counts(real_NL))


def attention_mse_sum(teacher_NALL: torch.Tensor, student_NALL: torch.Tensor, mask_NL: torch.Tensor) -> torch.Tensor:
    """Sum over rows of the mean squared difference over heads and a row's real queries and real keys.

    TinyBERT (arXiv:1909.10351, section 3.1), which takes scores before the softmax; probabilities and
    scores both do here. Where the numbers of heads differ, each side is first averaged over its heads. A row without
    real tokens adds 0. Raises ValueError on shapes that differ otherwise.
    """
    teacher_NALL, student_NALL = _same_heads(teacher_NALL, student_NALL)
    real_NL = real_tokens(mask_NL, student_NALL.shape[0], student_NALL.shape[2])
    weight_N = 1 / (token_counts(real_NL).square() * student_NALL.shape[1])
    return _MaskedSquares.apply(student_NALL, teacher_NALL.detach(), _padded_pairs(real_NL), weight_N)


def attention_kl_sum(teacher_NALL: torch.Tensor, student_NALL: torch.Tensor, mask_NL: torch.Tensor) -> torch.Tensor:
    """Sum over rows of KL(teacher || student) in nats over the real keys, averaged over heads and a row's real queries.

    MiniLM (Wang et al. 2020, arXiv:2002.10957, section 3.1). Takes probabilities, as they are: they are not
    normalised again. Where the numbers of heads differ, each side is first averaged over its heads, which leaves
    probabilities. A student's probability below the smallest normal number of its dtype counts as that number, in the
    gradient too, so that one that underflowed is still pulled up. A row without real tokens adds 0. Raises ValueError
    on shapes that differ otherwise.
    """
    smallest = torch.finfo(student_NALL.dtype).tiny
    teacher_NALL, student_NALL = _same_heads(teacher_NALL, student_NALL)
    real_NL = real_tokens(mask_NL, student_NALL.shape[0], student_NALL.shape[2])
    weight_N = 1 / (token_counts(real_NL) * student_NALL.shape[1])
    floor = max(smallest, torch.finfo(torch.float32).tiny)
    return _MaskedKL.apply(student_NALL, teacher_NALL.detach(), _padded_pairs(real_NL), weight_N, floor)


def mean_pool(hidden_NLW: torch.Tensor, mask_NL: torch.Tensor) -> torch.Tensor:
    """The mean of each row's real tokens in float32, with a gradient; 0 for a row without any. Shape: NW.

    Raises ValueError when the mask has another shape.
    """
    real_NL = real_tokens(mask_NL, *hidden_NLW.shape[:2])
    sums_NW = hidden_NLW.float().masked_fill(~real_NL[..., None], 0.0).sum(dim=1)
    return sums_NW / token_counts(real_NL)[:, None]


class _MaskedSquares(torch.autograd.Function):
    """Sum over rows of weight times the squares of student - teacher outside the padding."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, padding: torch.Tensor, weight_N: torch.Tensor
    ) -> torch.Tensor:
        teacher, ctx.dtype = _at_most_float32(teacher), student.dtype
        difference = student - teacher if student.dtype == torch.float32 else student.float().sub_(teacher)
        ctx.save_for_backward(difference.masked_fill_(padding, 0.0), weight_N)
        return (torch.linalg.vector_norm(difference.flatten(1), dim=1).square() * weight_N).sum()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        difference, weight_N = ctx.saved_tensors
        return _product(difference, _per_row(2 * grads[0] * weight_N, difference), ctx.dtype), None, None, None


class _MaskedCosine(torch.autograd.Function):
    """Sum over rows of weight times 1 - cos over real tokens, as half the square of the unit vectors' difference.

    In that form it is exactly 0 for equal inputs and never negative, where 1 - cos loses every digit near 0.
    """

    @staticmethod
    def forward(
        ctx: Any, student_NLW: torch.Tensor, teacher_NLW: torch.Tensor, real_NL: torch.Tensor, weight_N: torch.Tensor
    ) -> torch.Tensor:
        padding_NL1 = ~real_NL[..., None]
        unit_NLW, norm_NL = _units(student_NLW)
        difference_NLW, teacher_norm_NL = _units(teacher_NLW)
        difference_NLW.neg_().add_(unit_NLW).masked_fill_(padding_NL1, 0.0)
        unit_NLW.masked_fill_(padding_NL1, 0.0)
        directed_NL = (norm_NL > 0) & (teacher_norm_NL > 0)
        half_squares_NL = torch.linalg.vector_norm(difference_NLW, dim=2).square() / 2
        losses_NL = torch.where(directed_NL, half_squares_NL, 1.0).masked_fill_(~real_NL, 0.0)
        slopes_NL = (weight_N[:, None] / norm_NL).masked_fill_(~(real_NL & directed_NL), 0.0)
        ctx.save_for_backward(unit_NLW, difference_NLW, losses_NL, slopes_NL)
        return (losses_NL.sum(dim=1) * weight_N).sum()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        # cos has the gradient (teacher's unit - cos * unit) / norm; the difference holds unit - teacher's unit.
        unit_NLW, difference_NLW, losses_NL, slopes_NL = ctx.saved_tensors
        gradient_NLW = torch.addcmul(difference_NLW, unit_NLW, losses_NL[..., None], value=-1)
        return gradient_NLW.mul_((grads[0] * slopes_NL)[..., None]), None, None, None


class _MaskedKL(torch.autograd.Function):
    """Sum over rows of weight times teacher * ln(teacher / student) outside the padding."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        padding: torch.Tensor,
        weight_N: torch.Tensor,
        floor: float,
    ) -> torch.Tensor:
        teacher, ctx.dtype = _at_most_float32(teacher), student.dtype
        ratio = student.clamp_min(floor).float()
        torch.div(teacher, ratio, out=ratio)
        terms = torch.xlogy(teacher, ratio).masked_fill_(padding, 0.0)
        ctx.save_for_backward(ratio.masked_fill_(padding, 0.0), weight_N)
        return (terms.flatten(1).sum(dim=1) * weight_N).sum()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        ratio, weight_N = ctx.saved_tensors
        return _product(ratio, _per_row(-grads[0] * weight_N, ratio), ctx.dtype), None, None, None, None


def _units(vectors_NLW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of length 1 in float32, newly allocated, and the lengths that they had: 0 for those without direction."""
    # Divided by the largest component first: the square of a number above 1.8e19 is infinite in float32.
    largest_NL1 = torch.linalg.vector_norm(vectors_NLW, ord=float("inf"), dim=2, keepdim=True).float()
    scale_NL1 = largest_NL1.clamp_min(SMALLEST_COMPONENT)
    is_float32 = vectors_NLW.dtype == torch.float32
    units_NLW = vectors_NLW / scale_NL1 if is_float32 else vectors_NLW.float().div_(scale_NL1)
    norms_NL1 = torch.linalg.vector_norm(units_NLW, dim=2, keepdim=True)
    units_NLW.div_(norms_NL1.clamp_min(1.0))
    lengths_NL1 = (norms_NL1 * scale_NL1).masked_fill_(largest_NL1 < SMALLEST_COMPONENT, 0.0)
    return units_NLW, lengths_NL1.squeeze(2)


def _at_most_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Narrower ones stay as they are: they are widened by the operation with a float32 tensor, without a copy."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _product(tensor: torch.Tensor, factors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """tensor * factors, computed in float32 and written in this dtype without a float32 copy between."""
    return torch.mul(tensor, factors, out=torch.empty_like(tensor, dtype=dtype))


def _per_row(values_N: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values_N.view(-1, *([1] * (like.dim() - 1)))


def _padded_pairs(real_NL: torch.Tensor) -> torch.Tensor:
    """True where the query or the key is padding. Shape: N1LL."""
    return ~(real_NL[:, None, :, None] & real_NL[:, None, None, :])


def _same_heads(teacher_NALL: torch.Tensor, student_NALL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as they are, or both averaged over their heads in float32 where the numbers of heads differ."""
    if teacher_NALL.dim() == student_NALL.dim() == 4 and teacher_NALL.shape[1] != student_NALL.shape[1]:
        teacher_NALL, student_NALL = (
            torch.mean(maps, dim=1, keepdim=True, dtype=torch.float32) for maps in (teacher_NALL, student_NALL)
        )
    _check_same_shape(teacher_NALL, student_NALL, dimensions=4)
    if student_NALL.shape[2] != student_NALL.shape[3]:
        raise ValueError(f"attention map {tuple(student_NALL.shape)}: expected as many keys as queries")
    return teacher_NALL, student_NALL


def _check_same_shape(teacher: torch.Tensor, student: torch.Tensor, *, dimensions: int = 3) -> None:
    if teacher.dim() != dimensions or teacher.shape != student.shape:
        remedy = "Project the student to the teacher's width" if dimensions == 3 else "Give both the same tokens"
        raise ValueError(
            f"teacher {tuple(teacher.shape)} and student {tuple(student.shape)}: expected two equal shapes of"
            f" {dimensions} dimensions. {remedy}"
        )
