"""A model with fewer rows in its tables: those of tokens, and those of absolute positions."""

from __future__ import annotations

import copy
from typing import Any

import torch

from raydistill.errors import UserError
from raydistill.models.configuration import OFFSET_POSITIONS, position_offset


def token_ids_of(config: Any, tokens: int) -> set[int]:
    """The ids that a configuration names, such as pad_token_id, of a tokenizer with so many tokens."""
    found = [value for name, value in config.to_dict().items() if name.endswith("_token_id")]
    flat = (number for value in found for number in (value if isinstance(value, list) else [value]))
    return {number for number in flat if isinstance(number, int) and 0 <= number < tokens}


def with_tokens(model: Any, kept: list[int], *, pad_id: int) -> Any:
    """The model with these rows of its token embeddings, in this order, and the ids in its configuration to fit.

    `pad_id` is the padding token's new id. Positions that are counted from it move with it.
    Raises UserError for an architecture with tables that this does not know.
    """
    config, new = copy.deepcopy(model.config), {old: number for number, old in enumerate(kept)}
    for name, value in config.to_dict().items():
        if name.endswith("_token_id") and isinstance(value, int):
            setattr(config, name, new.get(value, pad_id if name == "pad_token_id" else None))
        elif name.endswith("_token_id") and isinstance(value, list):
            setattr(config, name, [new[number] for number in value if number in new])
    config.vocab_size = len(kept)
    weights = model.state_dict()
    table = model.get_input_embeddings().weight
    rows = torch.tensor(kept)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is table:
            weights[name] = weights[name][rows]
    if config.model_type in OFFSET_POSITIONS:
        moved = model.config.pad_token_id - config.pad_token_id
        _cut_positions(model, weights, config, slice(moved, None))
    return _rebuilt("trim_vocabulary", model, config, weights)


def with_positions(model: Any, count: int) -> Any:
    """The model with absolute positions for that many tokens, the first ones that it had.

    Raises UserError for an architecture without a table of absolute positions, and for more than it has.
    """
    config, weights = copy.deepcopy(model.config), model.state_dict()
    offset = position_offset(config.model_type, config.pad_token_id)
    longest = getattr(config, "max_position_embeddings", 0) - offset
    if not _position_tables(model):
        raise UserError(
            f"student.max_positions: {type(model).__name__} has no table of absolute positions. Remove max_positions"
        )
    if count > longest:
        raise UserError(f"student.max_positions: found {count}, the model has {longest}. Set at most that")
    # DeBERTa's distances are as many as its positions unless they are named.
    if getattr(config, "relative_attention", False) and config.max_relative_positions < 1:
        config.max_relative_positions = config.max_position_embeddings
    _cut_positions(model, weights, config, slice(0, count + offset))
    return _rebuilt("max_positions", model, config, weights)


def _position_tables(model: Any) -> list[str]:
    """The names of the tables of absolute positions, such as BERT's `position_embeddings` and GPT-2's `wpe`."""
    count = getattr(model.config, "max_position_embeddings", None)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
        and module.num_embeddings == count
        and name.rpartition(".")[2] in ("position_embeddings", "wpe")
    ]


def _cut_positions(model: Any, weights: dict[str, torch.Tensor], config: Any, rows: slice) -> None:
    for table in _position_tables(model):
        weights[f"{table}.weight"] = weights[f"{table}.weight"][rows]
        config.max_position_embeddings = len(weights[f"{table}.weight"])


def _rebuilt(setting: str, model: Any, config: Any, weights: dict[str, torch.Tensor]) -> Any:
    try:
        made = type(model)(config)
        made.load_state_dict(weights)
    except (ValueError, RuntimeError, AssertionError):
        raise UserError(
            f"student.{setting}: {type(model).__name__} keeps its embeddings in a way that is not known."
            f" Remove {setting}"
        ) from None
    return made
