"""The teacher's features by the names under which a cache keeps them: "hidden.5", "attention_mean.11", "embeddings".

A row's features are kept for its real tokens alone. Queries, keys and values are kept as vectors and not as the
relations that the losses make of them: a token's vector has W numbers, its relations R L with R relation heads, so
that vectors are the smaller ones for rows longer than W / R (32 to 64 tokens), at most a few times larger for shorter
ones, and serve any number of relation heads. Of attention maps the mean over the heads is kept where the student has
another number of heads, because the losses then compare means; they make them themselves of maps that are kept whole.

Shapes: N rows, L tokens, W width, A attention heads.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

import torch

from raydistill.losses.feature_objective import TEACHER, FeatureTerm
from raydistill.losses.features import mean_pool
from raydistill.targets import Features

Axes = Literal["W", "LW", "ALL"]
WITHOUT_LAYER = "embeddings"


def names_of_term(term: FeatureTerm) -> tuple[str, ...]:
    """The name of what the term takes from the teacher for each of its pairs of layers."""
    what = term.definition.what
    if what == WITHOUT_LAYER:
        return tuple(WITHOUT_LAYER for _ in term.pairs)
    kept = "attention_mean" if what == "attention" and term.averaged else what
    return tuple(f"{kept}.{pair[TEACHER]}" for pair in term.pairs)


def all_names(terms: Iterable[FeatureTerm]) -> tuple[str, ...]:
    """Every name that the terms take, once each, in alphabetical order."""
    return tuple(sorted({name for term in terms for name in names_of_term(term)}))


def serving(name: str, kept: Collection[str]) -> str | None:
    """Which of the kept features serves as this one: itself, or the maps whose mean it is; None where none does."""
    maps = name.replace("attention_mean.", "attention.")
    return name if name in kept else maps if maps in kept else None


def axes_of(name: str) -> Axes:
    """The shape of one row of it: W, L x W or A x L x L."""
    what, _ = _parts(name)
    if what == "pooled":
        return "W"
    return "ALL" if what.startswith("attention") else "LW"


def tap_arguments(names: Sequence[str]) -> dict[str, Any]:
    """What a FeatureTap must capture for these names, as its arguments."""

    def layers(*whats: str) -> tuple[int, ...]:
        return tuple(sorted({layer for what, layer in map(_parts, names) if what in whats}))

    return {
        "embeddings": WITHOUT_LAYER in names,
        "hidden": layers("hidden", "pooled"),
        "attention": layers("attention", "attention_mean"),
        "projections": layers("queries", "keys", "values"),
    }


def pick(features: Features, name: str, mask_NL: torch.Tensor) -> torch.Tensor:
    """The features of this name: NW, NLW or NALL by `axes_of`. Padding holds whatever the model left there."""
    what, layer = _parts(name)
    if what == "pooled":
        return mean_pool(features.hidden_NLW[layer], mask_NL)
    if what == "attention_mean":
        return torch.mean(features.attention_NALL[layer], dim=1, keepdim=True, dtype=torch.float32)
    if what == WITHOUT_LAYER:
        assert features.embeddings_NLW is not None
        return features.embeddings_NLW
    by_layer = {
        "hidden": features.hidden_NLW, "attention": features.attention_NALL, "queries": features.queries_NLW,
        "keys": features.keys_NLW, "values": features.values_NLW,
    }  # fmt: skip
    return by_layer[what][layer]


def _parts(name: str) -> tuple[str, int]:
    what, _, layer = name.partition(".")
    return what, int(layer or -1)
