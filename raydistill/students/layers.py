"""A student of some of its teacher's layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from raydistill.errors import UserError
from raydistill.losses.layer_maps import layer_map
from raydistill.students.blocks import layer_stack
from raydistill.students.sizes import set_dropout


def every_other(count: int) -> list[int]:
    """The layers of a student that names none: the second, the fourth and so on, or the only one."""
    return list(range(1, count, 2)) or [0]


def chosen_layers(layers: str | Sequence[int] | None, number: int | None, count: int) -> list[int]:
    """The layers, of a teacher's `count`, that a student takes: a list as it is, or `number` of them by a rule.

    `first` and `last` are those in a row from an end. `uniform` begins with the first and ends with the last, with even
    distances between (halves round up), and is the last alone for a student of one layer: the layer map `uniform`. None
    is every other one. Raises UserError for a layer that the teacher does not have.
    """
    if layers is None:
        return every_other(count)
    if not isinstance(layers, str):
        if layers[-1] >= count:
            raise UserError(f"student.layers: found {layers[-1]}, the teacher's layers are 0 to {count - 1}")
        return list(layers)
    assert number is not None
    if number > count:
        raise UserError(f"student.num_layers: found {number}, the teacher has {count} layers. Give at most {count}")
    if layers == "uniform":
        return [layer for _, layer in layer_map("uniform", number, count)]
    return list(range(number)) if layers == "first" else list(range(count - number, count))


def student_from_layers(teacher: Any, layers: list[int] | None, dropout: float | None) -> Any:
    """A student of some of the teacher's layers, its embeddings and its head (DistilBERT, arXiv:1910.01108, section 2).

    Raises UserError when the architecture has no one stack of layers, or a layer is not there or does not fit.
    """
    count = teacher.config.num_hidden_layers
    chosen = chosen_layers(layers, None, count)
    stack = layer_stack(teacher, count)
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(chosen)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in chosen]
    set_dropout(config, dropout)
    weights = {}
    for name, value in teacher.state_dict().items():
        if not name.startswith(f"{stack}."):
            weights[name] = value
            continue
        number, _, rest = name.removeprefix(f"{stack}.").partition(".")
        if int(number) in chosen:
            weights[f"{stack}.{chosen.index(int(number))}.{rest}"] = value
    try:
        student = type(teacher)(config)
        student.load_state_dict(weights)
    except (ValueError, RuntimeError, AssertionError):
        raise UserError(
            f"student.layers: found {chosen}; the layers of {type(teacher).__name__} differ, and these do not fit one"
            " after the other. Choose others, or use init: config or init: pretrained"
        ) from None
    return student


def reorder_head(model: Any, order: list[int]) -> None:
    """Puts the rows of the last linear layer, the head, into the order of the data's labels."""
    if order == list(range(len(order))):
        return
    head = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == len(order)][-1]
    with torch.no_grad():
        head.weight.copy_(head.weight[order])
        if head.bias is not None:
            head.bias.copy_(head.bias[order])
