"""What a stack of models computes with: products, norms and attention with weights of its own for every member.

Gradients are written out, so that they come in the parameters' own layout and no tensor is copied for it.

Shapes: M members, S tokens of a batch's rows end to end, V vocabulary, I and O width of what goes in and comes out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def linear(x_MSI: torch.Tensor, weight_MOI: torch.Tensor, bias_MO: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x W^T + b for every member, computed in dtype; what its gradients are summed in too, as under autocast."""
    return _Linear.apply(x_MSI, weight_MOI, bias_MO, dtype)  # type: ignore[return-value]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MSI: Any, weight_MOI: Any, bias_MO: Any, dtype: Any) -> Any:
        ctx.input_dtype = x_MSI.dtype
        x_MSI, weight_MOI = x_MSI.to(dtype), weight_MOI.to(dtype)
        ctx.save_for_backward(x_MSI, weight_MOI)
        return torch.baddbmm(bias_MO.to(dtype).unsqueeze(1), x_MSI, weight_MOI.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient_MSO,) = gradients
        x_MSI, weight_MOI = ctx.saved_tensors
        back_MSI = torch.bmm(gradient_MSO, weight_MOI).to(ctx.input_dtype) if ctx.needs_input_grad[0] else None
        weight = torch.bmm(gradient_MSO.transpose(1, 2), x_MSI).float()
        return back_MSI, weight, gradient_MSO.sum(dim=1, dtype=torch.float32), None


def norm(x_MSI: torch.Tensor, weight_MI: torch.Tensor, bias_MI: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm with every member's own weight and bias."""
    return _Norm.apply(x_MSI, weight_MI, bias_MI, eps)  # type: ignore[return-value]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MSI: Any, weight_MI: Any, bias_MI: Any, eps: Any) -> Any:
        normal_MSI, mean, scale = torch.native_layer_norm(x_MSI, x_MSI.shape[-1:], None, None, eps)
        ctx.save_for_backward(x_MSI, normal_MSI, mean, scale, weight_MI)
        return torch.addcmul(bias_MI.unsqueeze(1), normal_MSI, weight_MI.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient_MSI,) = gradients
        x_MSI, normal_MSI, mean, scale, weight_MI = ctx.saved_tensors
        weight = (gradient_MSI * normal_MSI).sum(dim=1)
        back, _, _ = torch.ops.aten.native_layer_norm_backward(
            gradient_MSI * weight_MI.unsqueeze(1), x_MSI, x_MSI.shape[-1:], mean, scale, None, None,
            [True, False, False],
        )  # fmt: skip
        return back, weight, gradient_MSI.sum(dim=1), None


def embedding(ids_MS: torch.Tensor, table_MVI: torch.Tensor, padding_id: int | None) -> torch.Tensor:
    """Every member's own rows of its table; ids of shape (1, S) are all members'. padding_id gets no gradient."""
    return _Embedding.apply(ids_MS, table_MVI, padding_id)  # type: ignore[return-value]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids_MS: Any, table_MVI: Any, padding_id: Any) -> Any:
        members, size, _ = table_MVI.shape
        flat_MS = ids_MS + size * torch.arange(members, device=ids_MS.device).unsqueeze(1)
        ctx.save_for_backward(flat_MS)
        ctx.shape, ctx.padding_id = table_MVI.shape, padding_id
        return F.embedding(flat_MS, table_MVI.flatten(0, 1))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient_MSI,) = gradients
        members, size, _ = ctx.shape
        table = torch.ops.aten.embedding_dense_backward(gradient_MSI, ctx.saved_tensors[0], members * size, -1, False)
        table = table.view(ctx.shape)
        if ctx.padding_id is not None:
            table[:, ctx.padding_id] = 0
        return None, table, None
