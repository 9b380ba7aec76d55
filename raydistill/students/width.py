"""A narrower student: every layer keeps some of its feed-forward's units and some of its attention's heads.

The hidden width stays. What comes out is a stock model of the same class, whose configuration says all its sizes, so
that `from_pretrained` loads it without this package. Units can be left out wherever the feed-forward is known. Heads
can be where the configuration has a width of a head of its own (`head_dim`: Llama, Qwen, Mistral, Gemma, EuroBERT,
NomicBERT). BERT, RoBERTa, DistilBERT, ELECTRA, DeBERTa-v2, ModernBERT and GPT-2 make a head hidden_size / heads wide:
with fewer heads the same weights would be read as wider ones. There they are refused: zeroed heads would save nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from raydistill.errors import UserError, first_line
from raydistill.students.blocks import (
    KEYS,
    OUTPUT,
    QUERIES,
    VALUES,
    Attention,
    FeedForward,
    attention,
    feed_forward,
    is_transposed,
    layer_stack,
    layers_of,
    widths,
)
from raydistill.students.sizes import FEED_FORWARD_NAMES

UNIT_NAMES = (*FEED_FORWARD_NAMES, "ffn_dim", "ffn_hidden_size")
Kept = Sequence[torch.Tensor]  # for each layer the numbers of what it keeps, rising


def blocks_to_narrow(
    model: Any, *, units: int | None, heads: int | None
) -> tuple[FeedForward | None, Attention | None]:
    """The blocks that lose something when each layer keeps so many units and heads; None for one that keeps all.

    Raises UserError for more than the model has, a number that shared keys and values do not allow, and blocks that are
    not known or cannot be narrowed.
    """
    block = None if units is None else feed_forward(model)
    if block is not None and units is not None and units > block.units:
        raise UserError(
            f"student.feed_forward: found {units}, the teacher's layers have {block.units} units."
            f" Give at most {block.units}"
        )
    had = model.config.num_attention_heads
    if heads is not None and heads > had:
        raise UserError(f"student.num_heads: found {heads}, the teacher has {had}. Give at most {had}")
    heads_block = None if heads in (None, had) else attention(model)
    if heads_block is not None and heads is not None and heads_block.key_value_heads < had:
        sharing = heads_block.key_value_heads
        if heads % sharing:
            raise UserError(
                f"student.num_heads: found {heads}, the teacher's {had} heads share {sharing} keys and values, of which"
                f" each keeps as many. Give a multiple of {sharing}"
            )
    return (None if block is None or units == block.units else block), heads_block


def narrowed(model: Any, *, units: Kept | None = None, heads: Kept | None = None) -> Any:
    """A model of the same class whose layers keep these units and heads; None keeps all.

    Raises UserError when the architecture does not take the new sizes.
    """
    if units is None and heads is None:
        return model
    config, weights = copy.deepcopy(model.config), dict(model.state_dict())
    stack, layers = layer_stack(model, config.num_hidden_layers), layers_of(model)
    if units is not None:
        block = feed_forward(model)
        _set_units(config, block.units, len(units[0]))
        for number, layer in enumerate(layers):
            _keep_units(weights, f"{stack}.{number}", layer, block, units[number])
    if heads is not None:
        block = attention(model)
        _set_heads(config, block, len(heads[0]))
        for number, layer in enumerate(layers):
            _keep_heads(weights, f"{stack}.{number}", layer, block, heads[number])
    return _built(type(model), config, weights)


def _keep_units(weights: dict[str, torch.Tensor], place: str, layer: Any, block: FeedForward, kept: Any) -> None:
    for path in block.ups:
        linear = layer.get_submodule(path)
        halves = range(widths(linear)[1] // block.units)
        _keep_outputs(weights, f"{place}.{path}", linear, torch.cat([kept + half * block.units for half in halves]))
    _keep_inputs(weights, f"{place}.{block.down}", layer.get_submodule(block.down), kept)


def _keep_heads(weights: dict[str, torch.Tensor], place: str, layer: Any, block: Attention, kept: Any) -> None:
    """Where heads share keys and values, each of those keeps as many heads, and they all stay."""
    values = (kept[:, None] * block.head_dim + torch.arange(block.head_dim)).flatten()
    own = block.key_value_heads == block.heads
    for name in (QUERIES, KEYS, VALUES) if own else (QUERIES,):
        path = f"{block.path}.{name}"
        _keep_outputs(weights, f"{place}.{path}", layer.get_submodule(path), values)
    path = f"{block.path}.{OUTPUT}"
    _keep_inputs(weights, f"{place}.{path}", layer.get_submodule(path), values)


def _keep_outputs(weights: dict[str, torch.Tensor], name: str, linear: Any, kept: torch.Tensor) -> None:
    weights[f"{name}.weight"] = weights[f"{name}.weight"].index_select(1 if is_transposed(linear) else 0, kept)
    if linear.bias is not None:
        weights[f"{name}.bias"] = weights[f"{name}.bias"].index_select(0, kept)


def _keep_inputs(weights: dict[str, torch.Tensor], name: str, linear: Any, kept: torch.Tensor) -> None:
    weights[f"{name}.weight"] = weights[f"{name}.weight"].index_select(0 if is_transposed(linear) else 1, kept)


def _set_units(config: Any, before: int, units: int) -> None:
    """Under the name that the configuration has for them; GPT-2's is None where it is four times the width."""
    for name in UNIT_NAMES:
        if hasattr(config, name) and getattr(config, name) in (None, before):
            setattr(config, name, units)


def _set_heads(config: Any, block: Attention, heads: int) -> None:
    config.head_dim = block.head_dim
    config.num_attention_heads = heads
    if block.key_value_heads == block.heads and hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = heads


def _built(kind: Callable[[Any], Any], config: Any, weights: dict[str, torch.Tensor]) -> Any:
    """The model of a configuration that transformers loads again, with these weights."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        type(config).from_dict(config.to_dict())  # with the checks that from_pretrained makes
        model = kind(config)
    except (ValueError, AssertionError, StrictDataclassError) as error:
        raise _refused(config, first_line(error.__cause__ or error)) from None
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise _refused(config, "more of its weights have them than are known here") from None
    return model


def _refused(config: Any, reason: str) -> UserError:
    return UserError(
        f"student: a {config.model_type} cannot have layers of {config.num_attention_heads} heads and so many units"
        f" ({reason}). Choose other numbers for student.num_heads and student.feed_forward, or leave them out"
    )
