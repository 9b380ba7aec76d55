"""The feature terms of an objective: which of the teacher's features, by which loss, between which layers.

Shapes: N rows, L tokens, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from raydistill.losses.features import (
    attention_kl_sum,
    attention_mse_sum,
    hidden_cosine_sum,
    hidden_mse_sum,
    mean_pool,
)
from raydistill.losses.layer_maps import LayerPairs
from raydistill.losses.relations import relation_kl_sum, rkd_angle_sum, rkd_distance_sum
from raydistill.targets import Features

What = Literal["embeddings", "hidden", "attention", "queries", "keys", "values", "pooled"]
TEACHER, STUDENT = 1, 0  # places in a pair of layers


@dataclass(frozen=True)
class FeatureLoss:
    """A loss on features and what it compares.

    projected: it compares number by number, so that a narrower student needs a projection to the teacher's width.
    relation: it takes relation_heads. layers: the layer map for when the config names none.
    """

    what: What
    function: Callable[..., torch.Tensor]
    layers: str
    projected: bool = False
    relation: bool = False


# MiniLM found the relations of the last layers enough (arXiv:2002.10957, section 3.1); RKD compares representations of
# whole rows (arXiv:1904.05068, section 3).
FEATURE_LOSSES: Mapping[str, FeatureLoss] = {
    "hidden_mse": FeatureLoss("hidden", hidden_mse_sum, "uniform", projected=True),
    "hidden_cosine": FeatureLoss("hidden", hidden_cosine_sum, "uniform", projected=True),
    "embeddings_mse": FeatureLoss("embeddings", hidden_mse_sum, "none", projected=True),
    "embeddings_cosine": FeatureLoss("embeddings", hidden_cosine_sum, "none", projected=True),
    "attention_mse": FeatureLoss("attention", attention_mse_sum, "uniform"),
    "attention_kl": FeatureLoss("attention", attention_kl_sum, "uniform"),
    "query_relation": FeatureLoss("queries", relation_kl_sum, "final", relation=True),
    "key_relation": FeatureLoss("keys", relation_kl_sum, "final", relation=True),
    "value_relation": FeatureLoss("values", relation_kl_sum, "final", relation=True),
    "rkd_distance": FeatureLoss("pooled", rkd_distance_sum, "final"),
    "rkd_angle": FeatureLoss("pooled", rkd_angle_sum, "final"),
}


@dataclass(frozen=True)
class FeatureTerm:
    """One term: `weight` times the mean over the pairs of layers (student, teacher) of the loss of this kind.

    name is what the curves call it. The pairs of embeddings are one pair whose layers mean nothing. averaged: student
    and teacher have different numbers of attention heads, so that the loss compares the means over them.
    """

    kind: str
    weight: float
    pairs: LayerPairs
    relation_heads: int | None = None
    name: str = ""
    averaged: bool = False

    @property
    def definition(self) -> FeatureLoss:
        return FEATURE_LOSSES[self.kind]

    def select(self, features: Features, side: int, mask_NL: torch.Tensor) -> list[torch.Tensor]:
        """What the loss compares, for each pair, of one side's features."""
        what = self.definition.what
        if what == "embeddings":
            assert features.embeddings_NLW is not None
            return [features.embeddings_NLW for _ in self.pairs]
        if what == "pooled":
            return [mean_pool(features.hidden_NLW[pair[side]], mask_NL) for pair in self.pairs]
        by_layer: Mapping[str, dict[int, torch.Tensor]] = {
            "hidden": features.hidden_NLW, "attention": features.attention_NALL, "queries": features.queries_NLW,
            "keys": features.keys_NLW, "values": features.values_NLW,
        }  # fmt: skip
        return [by_layer[what][pair[side]] for pair in self.pairs]

    def sum(
        self, teacher: Sequence[torch.Tensor], student: Sequence[torch.Tensor], mask_NL: torch.Tensor
    ) -> torch.Tensor:
        """Sum over rows of the mean over pairs, before the weight."""
        options: dict[str, Any] = {"relation_heads": self.relation_heads} if self.definition.relation else {}
        masks = () if self.definition.what == "pooled" else (mask_NL,)
        losses = [self.definition.function(t, s, *masks, **options) for t, s in zip(teacher, student, strict=True)]
        return torch.stack(losses).mean()


def needed(terms: Sequence[FeatureTerm], side: int) -> dict[str, Any]:
    """What a FeatureTap on this side must capture, as its arguments."""

    def layers(*kinds: What) -> tuple[int, ...]:
        return tuple(sorted({pair[side] for t in terms if t.definition.what in kinds for pair in t.pairs}))

    return {
        "embeddings": any(t.definition.what == "embeddings" for t in terms),
        "hidden": layers("hidden", "pooled"),
        "attention": layers("attention"),
        "projections": layers("queries", "keys", "values"),
    }
