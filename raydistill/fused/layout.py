"""Rows of several lengths end to end, without their padding; attention takes them in blocks of about one length.

Members with other seeds have other rows in the same step. Rows are ordered by length in each batch, and the k-th row of
all takes the tokens that the longest k-th row needs, so that one layout serves all; what is left over is computed and
used by nothing.

Shapes: B batches of a step (1 where all members share it), N rows, T tokens of a batch's longest row, S tokens end to
end, L tokens of a block's longest row, H heads, M members.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

# Rows at least so long as this share of the longest one are padded to it: less padding would be more, smaller products.
BLOCK_SHARE = 0.6
# oneDNN makes a kernel for every shape of a product in bfloat16, which takes longer than a small product: tokens, rows
# of a block and their length are rounded up to multiples, so that few shapes occur.
TOKENS, ROWS, LENGTH = 32, 8, 4


@dataclass(frozen=True)
class Block:
    """Rows of a layout, first to end, that attention takes together, padded to the length of the first."""

    first: int
    end: int
    length: int

    @property
    def rows(self) -> int:
        return self.end - self.first


class Layout:
    """Where the tokens of a step's batches stand: `inputs` are B batches of one number of rows, padded on the right."""

    def __init__(self, inputs: list[dict[str, torch.Tensor]], padding_id: int | None) -> None:
        """With `padding_id` positions are counted as RoBERTa does."""
        masks = [batch["attention_mask"] for batch in inputs]
        lengths_BN = torch.stack([mask.sum(dim=1) for mask in masks])
        self.lengths_BN, self.order_BN = lengths_BN.sort(dim=1, descending=True, stable=True)
        widths_N = self.lengths_BN.amax(dim=0)
        self.starts_N = widths_N.cumsum(0) - widths_N
        self.batches, self.rows = self.order_BN.shape
        self.widths = widths_N.tolist()
        self.tokens = _rounded(sum(self.widths), TOKENS)
        widths_N[-1] += self.tokens - sum(self.widths)  # what is rounded up stands at the end, in no row
        self.row_S = torch.repeat_interleave(torch.arange(self.rows), widths_N)
        self.place_S = torch.arange(self.tokens) - self.starts_N[self.row_S]
        self.padded_lengths = [mask.shape[1] for mask in masks]
        # Left-over tokens repeat the last token of their row.
        places_BS = torch.minimum(self.place_S, self.lengths_BN[:, self.row_S] - 1)
        padded = torch.tensor(self.padded_lengths).unsqueeze(1)
        self.flat_BS = self.order_BN[:, self.row_S] * padded + places_BS  # in each batch's own N x T
        self.ids_BS = self._taken([batch["input_ids"] for batch in inputs])
        self.positions_BS = places_BS if padding_id is None else self._counted_positions(inputs, padding_id)

    def _taken(self, values_NT: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([v.flatten()[flat] for v, flat in zip(values_NT, self.flat_BS, strict=True)])

    def _counted_positions(self, inputs: list[dict[str, torch.Tensor]], padding_id: int) -> torch.Tensor:
        """Positions as RoBERTa counts them: from padding_id + 1 on, over what is not that token."""
        real = [(batch["input_ids"] != padding_id).long() for batch in inputs]
        return self._taken([r.cumsum(dim=1) * r + padding_id for r in real])

    @cached_property
    def blocks(self) -> list[Block]:
        found: list[Block] = []
        for first in range(0, self.rows, ROWS):
            end = min(first + ROWS, self.rows)
            if found and self.widths[first] >= BLOCK_SHARE * found[-1].length:
                found[-1] = Block(found[-1].first, end, found[-1].length)
            else:
                found.append(Block(first, end, _rounded(self.widths[first], LENGTH)))
        return found

    @cached_property
    def masked_BNL(self) -> list[torch.Tensor]:
        """For every block which of its keys are padding."""
        lengths = [self.lengths_BN[:, block.first : block.end, None] for block in self.blocks]
        return [torch.arange(block.length) >= n for block, n in zip(self.blocks, lengths, strict=True)]

    def restored(self, values_MNK: torch.Tensor, batch_of_M: torch.Tensor) -> torch.Tensor:
        """Rows of every member back in the order of its batch."""
        back_BN = self.order_BN.argsort(dim=1).to(values_MNK.device)
        if self.batches == 1:
            return values_MNK[:, back_BN[0]]
        return values_MNK.gather(1, back_BN[batch_of_M].unsqueeze(-1).expand_as(values_MNK))


@dataclass(frozen=True)
class Gather:
    """Which head-wide pieces of what members have end to end stand where in the blocks, and the way back.

    `into` orders pieces as (part, member, row, head, place) block after block, from (member, token, part, head), and
    ends with one piece more; `back` is its inverse, without the padding. Tokens of no row come back from that last
    piece. `shapes` are the blocks', without the width of a head.
    """

    into: torch.Tensor
    back: torch.Tensor
    shapes: list[tuple[int, ...]]


def gather(layout: Layout, members: int, heads: int, *, parts: int, first_only: bool) -> Gather:
    """The gather for all tokens of the rows, or for the first of each alone, which then stand row by row."""
    tokens = layout.rows if first_only else layout.tokens
    starts_N = torch.arange(layout.rows) if first_only else layout.starts_N
    widths_N = torch.ones(layout.rows, dtype=torch.long) if first_only else torch.tensor(layout.widths)
    part, member, head = torch.arange(parts), torch.arange(members), torch.arange(heads)
    into: list[torch.Tensor] = []
    back: list[torch.Tensor] = []
    shapes: list[tuple[int, ...]] = []
    offset = 0
    for block in layout.blocks:
        length, rows = 1 if first_only else block.length, slice(block.first, block.end)
        places_L = torch.arange(length)
        token_NL = starts_N[rows, None] + torch.minimum(places_L, widths_N[rows, None] - 1)
        from_member = (member.view(-1, 1, 1, 1) * tokens + token_NL.unsqueeze(1)) * parts
        into.append(((from_member + part.view(-1, 1, 1, 1, 1)) * heads + head.view(-1, 1)).flatten())
        shape = (parts, members, block.rows, heads, length)
        row_S, place_S = (places_L < widths_N[rows, None]).nonzero(as_tuple=True)
        of_row = (part.view(-1, 1) * members + member.view(-1, 1, 1, 1)) * block.rows + row_S.view(-1, 1, 1)
        back.append(offset + (of_row * heads + head) * length + place_S.view(-1, 1, 1))
        shapes.append(shape)
        offset += torch.Size(shape).numel()
    into.append(torch.zeros(1, dtype=torch.long))
    left_over = tokens - int(widths_N.sum())
    back.append(torch.full((members, left_over, parts, heads), offset))
    return Gather(torch.cat(into), torch.cat(back, dim=1).flatten(), shapes)


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
