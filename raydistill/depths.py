"""The depths of a classifier, from its head down to its embeddings: what progressive unfreezing thaws one by one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from raydistill.errors import UserError
from raydistill.students.blocks import layer_stacks

PROBE_TOKENS = 2


def count_depths(model: Any, setting: str) -> int:
    """How many depths a model has: its head, each of its layers, its embeddings. Works without weights (meta device).

    Raises UserError, naming the setting, for a model without one stack of layers.
    """
    return _layers(model, setting)[1] + 2


def parameter_depths(model: Any, setting: str) -> dict[str, int]:
    """The depth of every parameter by its name: 0 is the head, 1 the last layer, and the embeddings are the deepest.

    The names of modules do not tell what stands behind the last layer (a final norm) and what before the first (the
    tables of relative positions), so one forward of two tokens does: a parameter outside the layers belongs to the
    layer behind which its module runs first, to the head behind the last one, and to the embeddings before the first,
    or where its module does not run by itself. Raises UserError as `count_depths` does.
    """
    stack, count = _layers(model, setting)
    places = _places_of_first_use(model, stack, count)
    found: dict[int, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        inside = name.removeprefix(f"{stack}.").partition(".")[0] if name.startswith(f"{stack}.") else None
        place = int(inside) if inside is not None else places.get(name.rpartition(".")[0], -1)
        found[id(parameter)] = min(found.get(id(parameter), count), place)  # a tied one is as deep as its deepest use
    return {name: count - found[id(parameter)] for name, parameter in model.named_parameters()}


def _layers(model: Any, setting: str) -> tuple[str, int]:
    """The path of the one stack of layers and how many there are."""
    count = getattr(model.config, "num_hidden_layers", None)
    stacks = layer_stacks(model, count) if count else []
    if len(stacks) != 1:
        raise UserError(
            f"{setting}: {type(model).__name__} has {len(stacks)} stacks of layers, one that transformers shows is"
            " needed. Remove the setting, or choose another student"
        )
    assert count is not None
    return stacks[0], count


def _places_of_first_use(model: Any, stack: str, count: int) -> dict[str, int]:
    """For every module that runs, the layer that began last before it did first: -1 before all, `count` after all."""
    place, places = -1, dict[str, int]()

    def reach(layer: int, *_: Any) -> None:
        nonlocal place
        place = layer

    def note(name: str, *_: Any) -> None:
        places.setdefault(name, place)

    layers = model.get_submodule(stack)
    handles = [module.register_forward_pre_hook(partial(reach, layer)) for layer, module in enumerate(layers)]
    handles.append(layers[-1].register_forward_hook(partial(reach, count)))
    handles += [module.register_forward_pre_hook(partial(note, name)) for name, module in model.named_modules()]
    was_training, device = model.training, next(model.parameters()).device
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=device)
    try:
        with torch.no_grad():
            model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return places
