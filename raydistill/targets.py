"""What a batch carries from the teacher to a loss: its logits, and its features where a loss asks for them.

Shapes: N rows, K classes, L tokens, W width, A attention heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Features:
    """What one forward left behind, by layer: only what was asked for. Attached to the graph where the forward was.

    embeddings_NLW is what goes into layer 0; attention_NALL are probabilities, the first L the query.
    """

    embeddings_NLW: torch.Tensor | None = None
    hidden_NLW: dict[int, torch.Tensor] = field(default_factory=dict)
    attention_NALL: dict[int, torch.Tensor] = field(default_factory=dict)
    queries_NLW: dict[int, torch.Tensor] = field(default_factory=dict)
    keys_NLW: dict[int, torch.Tensor] = field(default_factory=dict)
    values_NLW: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's outputs for the rows of a batch, in the batch's order.

    logits_NK: float32, K classes in the order of the data's labels. features: for each feature term of the objective
    and each of its pairs of layers, what the term compares.
    """

    logits_NK: torch.Tensor
    features: tuple[tuple[torch.Tensor, ...], ...] = ()

    def to(self, device: torch.device) -> TeacherTargets:
        moved = tuple(tuple(f.to(device, non_blocking=True) for f in term) for term in self.features)
        return TeacherTargets(self.logits_NK.to(device, non_blocking=True), moved)
