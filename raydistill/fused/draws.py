"""Dropout for stacked models: each member drops what it drops when it is trained alone.

A model's dropouts draw, one after the other, numbers for all of a padded batch from a generator that is seeded at each
step. The same numbers are drawn here, once for all members with the same seed, and those of padding are left out.

Shapes: B batches of a step, M members, N rows, T tokens of a padded batch, S tokens end to end, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from raydistill.fused.layout import Layout


class Draws:
    """The dropouts of one step, to be asked for in the order in which a model has them."""

    def __init__(
        self, layout: Layout, seeds: list[int], batch_of_M: torch.Tensor, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._layout, self._batch_of_M, self._device, self._dtype = layout, batch_of_M, device, dtype
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        places_BS, starts_B1 = layout.flat_BS, torch.tensor(layout.padded_lengths).unsqueeze(1)
        self._tokens_BS, self._firsts_BN = places_BS.to(device), (layout.order_BN * starts_B1).to(device)
        self._order_BN = layout.order_BN.to(device)

    def tokens(self, share: float, width: int, *, first_only: bool) -> torch.Tensor | None:
        """For what every token has: factors of shape (1 or M, S or N, width); None where nothing is dropped."""
        if not share:
            return None
        chosen = self._firsts_BN if first_only else self._tokens_BS
        shapes = [(self._layout.rows * length, width) for length in self._layout.padded_lengths]
        return self._of_members([self._draw(b, shape, share)[chosen[b]] for b, shape in enumerate(shapes)])

    def rows(self, share: float, width: int) -> torch.Tensor | None:
        """For what every row has: (1 or M, N, width)."""
        if not share:
            return None
        shape = (self._layout.rows, width)
        return self._of_members([self._draw(b, shape, share)[order] for b, order in enumerate(self._order_BN)])

    def attention(self, share: float, heads: int, *, first_only: bool) -> list[torch.Tensor] | None:
        """For attention's probabilities, block by block: (1 or M, N, H, tokens that ask, tokens)."""
        if not share:
            return None
        whole = [
            self._draw(b, (self._layout.rows, heads, length, length), share)
            for b, length in enumerate(self._layout.padded_lengths)
        ]
        found: list[torch.Tensor] = []
        for block in self._layout.blocks:
            asking = 1 if first_only else block.length
            rows = self._order_BN[:, block.first : block.end]
            parts = [w[r, :, :asking, : block.length] for w, r in zip(whole, rows, strict=True)]
            missing = [(0, block.length - p.shape[3], 0, asking - p.shape[2]) for p in parts]
            found.append(self._of_members([F.pad(p, m) if any(m) else p for p, m in zip(parts, missing, strict=True)]))
        return found

    def _draw(self, batch: int, shape: tuple[int, ...], share: float) -> torch.Tensor:
        kept = torch.empty(shape, device=self._device, dtype=self._dtype)
        return kept.bernoulli_(1 - share, generator=self._generators[batch]).div_(1 - share)

    def _of_members(self, values: list[torch.Tensor]) -> torch.Tensor:
        return values[0].unsqueeze(0) if len(values) == 1 else torch.stack(values)[self._batch_of_M]
