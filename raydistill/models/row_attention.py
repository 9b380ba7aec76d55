"""Attention of packed rows on a CPU: computed row by row, not over a whole pack in which most is masked.

A pack of W tokens takes W x W products in each head, of which only those within a row count. Rows of L tokens side by
side take L x L each, and need no mask, because what fills the shorter ones up comes after them. Everything else of a
model works on tokens and keeps them packed.

Shapes: P packs of W tokens, R rows of L tokens at most, H heads of D numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

NAME = "raydistill_rows"
# Architectures that hand to their attention what their forward is given, and in which every token sees all before it.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class RowLayout:
    """Where the tokens of packs stand among rows, and back; a place that has no counterpart names 0 and is not used."""

    rows: int
    token_S: torch.Tensor  # of every slot, R x L, the token in the packs laid end to end
    filled_S1: torch.Tensor
    slot_T: torch.Tensor  # of every token, P x W, its slot
    real_T1: torch.Tensor


def row_layout(position_ids_PW: torch.Tensor) -> RowLayout | None:
    """The rows of packs as pack_inputs makes them; None where the packs themselves take little more.

    A row begins at position 0 and has two tokens at least; padding is position 0 throughout.
    """
    positions_T = position_ids_PW.flatten()
    following_T = F.pad(position_ids_PW, (0, 1))[:, 1:].flatten()
    begins_R = ((positions_T == 0) & (following_T == 1)).nonzero()[:, 0]
    real_T = (positions_T > 0) | (following_T == 1)
    longest, (packs, width) = int(positions_T.max()) + 1, position_ids_PW.shape
    if len(begins_R) * longest**2 > packs * width**2:
        return None
    row_T = ((positions_T == 0) & (following_T == 1)).cumsum(dim=0) - 1
    slot_T = torch.where(real_T, row_T * longest + positions_T, 0)
    slots = len(begins_R) * longest
    token_S = torch.zeros(slots, dtype=torch.int64).scatter_(0, slot_T[real_T], real_T.nonzero()[:, 0])
    filled_S = torch.zeros(slots, dtype=torch.bool).index_fill_(0, slot_T[real_T], True)
    return RowLayout(len(begins_R), token_S, filled_S[:, None], slot_T, real_T[:, None])


class _Moved(torch.autograd.Function):
    """Rows of a matrix by index; as each is taken once where it counts, the gradient is taken back by index too."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, there: torch.Tensor, back: torch.Tensor, used: torch.Tensor) -> Any:
        ctx.save_for_backward(back, used)
        return values.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        back, used = ctx.saved_tensors
        return outer[0].index_select(0, back).mul_(used), None, None, None


def row_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
    rows: RowLayout | None = None, **given: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' interface: (P, H, W, D) each, keys and values perhaps of fewer heads, to (P, W, H, D).

    Without `rows` it is transformers' own, with the mask that it made.
    """
    if rows is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **given
        )  # pyright: ignore[reportReturnType]
    packs, _, width, _ = query.shape

    def apart(states_PHWD: torch.Tensor) -> torch.Tensor:
        flat = states_PHWD.transpose(1, 2).reshape(packs * width, -1)
        moved: Any = _Moved.apply(flat, rows.token_S, rows.slot_T, rows.real_T1)
        return moved.view(rows.rows, -1, states_PHWD.shape[1], states_PHWD.shape[3]).transpose(1, 2)

    found_RHLD = F.scaled_dot_product_attention(
        apart(query), apart(key), apart(value), dropout_p=dropout, scale=scaling, is_causal=True,
        enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
    flat: Any = found_RHLD.transpose(1, 2).reshape(len(rows.token_S), -1)
    flat = _Moved.apply(flat, rows.slot_T, rows.token_S, rows.filled_S1)
    return flat.view(packs, width, query.shape[1], -1), None


def attend_by_rows(model: Any) -> None:
    """Makes a model attend row by row where it is told the rows; one that cannot stays as it is."""
    config = model.config
    windows = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if config.model_type not in ARCHITECTURES or windows or config._attn_implementation != "sdpa":
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, row_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def with_rows(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Inputs with their rows, for a model that attends by rows, where they are packed and it saves products."""
    by_rows = model.config._attn_implementation == NAME and "position_ids" in inputs
    layout = row_layout(inputs["position_ids"]) if by_rows else None
    if layout is None:
        return inputs
    # A mask of four dimensions keeps transformers from making one; it is not looked at.
    return {**inputs, "rows": layout, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}
