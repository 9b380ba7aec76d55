"""Attention of every member over its rows, block after block, with a gradient that is written out.

Shapes: M members, S tokens of a batch's rows end to end, Q those that ask (all, or the first of each row), N rows, L
tokens of a block's longest row, H heads, W width of all heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from raydistill.fused.layout import Gather


@dataclass(frozen=True)
class Attending:
    """What a step's attention needs beside queries, keys and values.

    masked are the blocks' keys that are padding, (1 or M, N, 1, 1, L); dropped, where there is dropout, what their
    probabilities are multiplied by, (1 or M, N, H, Q of the row, L).
    """

    queries: Gather
    keys: Gather
    masked: list[torch.Tensor]
    dropped: list[torch.Tensor] | None
    scale: float


def attention(queries_MQW: torch.Tensor, keys_values_MSW: torch.Tensor, how: Attending, heads: int) -> torch.Tensor:
    """Softmax attention for the queries, M x Q x W; keys and values stand beside each other in 2 W."""
    return _Attention.apply(queries_MQW, keys_values_MSW, how, heads)  # type: ignore[return-value]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries_MQW: Any, keys_values_MSW: Any, how: Any, heads: Any) -> Any:
        width = queries_MQW.shape[-1] // heads
        queries = queries_MQW.reshape(-1, width).index_select(0, how.queries.into)
        keys_values = keys_values_MSW.reshape(-1, width).index_select(0, how.keys.into)
        answers, kept = torch.empty_like(queries), []
        answers[-1] = 0  # what tokens of no row get
        for number, (query, answer, (key, value)) in enumerate(_blocks(how, queries, answers, keys_values)):
            scores = torch.bmm(query, key.transpose(1, 2)).mul_(how.scale)
            shaped = scores.view(*how.queries.shapes[number][1:], -1)
            shaped.masked_fill_(how.masked[number], -torch.inf)
            probabilities = torch.softmax(shaped, dim=-1)
            kept.append(probabilities)
            if how.dropped is not None:
                probabilities = probabilities * how.dropped[number]
            torch.bmm(probabilities.view_as(scores), value, out=answer)
        ctx.save_for_backward(queries, keys_values, *kept)
        ctx.how, ctx.shapes = how, (queries_MQW.shape, keys_values_MSW.shape)
        return answers.index_select(0, how.queries.back).view(queries_MQW.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        how: Attending = ctx.how
        queries, keys_values, *kept = ctx.saved_tensors
        above = gradients[0].reshape(-1, queries.shape[-1])
        # Padding asks for nothing: no gradient comes back from it.
        answers = torch.zeros_like(queries).index_copy_(0, how.queries.back, above)
        back_queries, back_keys_values = torch.empty_like(queries), torch.empty_like(keys_values)
        back_queries[-1], back_keys_values[-1] = 0, 0
        blocks = zip(
            _blocks(how, queries, answers, keys_values), _blocks(how, back_queries, answers, back_keys_values), kept,
            strict=True,
        )  # fmt: skip
        for number, ((query, answer, (key, value)), (to_query, _, (to_key, to_value)), probabilities) in enumerate(
            blocks
        ):
            flat = (len(query), query.shape[1], key.shape[1])
            used = probabilities if how.dropped is None else probabilities * how.dropped[number]
            torch.bmm(used.view(flat).transpose(1, 2), answer, out=to_value)
            scores = torch.bmm(answer, value.transpose(1, 2)).view_as(probabilities)
            if how.dropped is not None:
                scores.mul_(how.dropped[number])
            scores = torch.ops.aten._softmax_backward_data(scores, probabilities, -1, probabilities.dtype)
            scores = scores.mul_(how.scale).view(flat)
            torch.bmm(scores, key, out=to_query)
            torch.bmm(scores.transpose(1, 2), query, out=to_key)
        return (
            back_queries.index_select(0, how.queries.back).view(ctx.shapes[0]),
            back_keys_values.index_select(0, how.keys.back).view(ctx.shapes[1]),
            None,
            None,
        )


def _blocks(how: Attending, queries: torch.Tensor, answers: torch.Tensor, keys_values: torch.Tensor) -> Any:
    """Every block's (query, answer, (key, value)), each (M x N x H, places, width of a head)."""
    asked = told = 0
    for (_, *query_shape), (_, *key_shape) in zip(how.queries.shapes, how.keys.shapes, strict=True):
        size, places = torch.Size(query_shape[:-1]).numel(), (query_shape[-1], key_shape[-1])
        ask, tell = size * places[0], size * places[1]
        query, answer = (t[asked : asked + ask].view(size, places[0], -1) for t in (queries, answers))
        key, value = keys_values[told : told + 2 * tell].view(2, size, places[1], -1)
        yield query, answer, (key, value)
        asked, told = asked + ask, told + 2 * tell
