"""Which tokens count. Padding is where a mask is 0; a loss never reads it, whatever it holds, NaN included.

Shapes: N rows, L tokens.
"""

import torch


def real_tokens(mask_NL: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """The mask as booleans: True where a token is real. Takes a tokenizer's attention mask (0 and 1) or booleans.

    Raises ValueError when its shape is not (rows, length).
    """
    if mask_NL.shape != (rows, length):
        raise ValueError(
            f"token mask {tuple(mask_NL.shape)}: expected ({rows}, {length}), the rows and tokens of what it masks"
        )
    return mask_NL.bool()


def token_counts(real_NL: torch.Tensor) -> torch.Tensor:
    """Real tokens of each row in float32, at least 1, so that a row without any divides nothing by 1. Shape: N."""
    return real_NL.sum(dim=1).clamp_min(1).float()
