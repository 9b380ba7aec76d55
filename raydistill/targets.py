"""What a batch carries from the teacher to a loss: its logits, and its features where a loss asks for them.

Shapes: N rows, K classes, L tokens, W width, A attention heads; of a language model N positions, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

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
    and each of its pairs of layers, what the term compares. excluded_N: the rows that are not learned from them.
    """

    logits_NK: torch.Tensor
    features: tuple[tuple[torch.Tensor, ...], ...] = ()
    excluded_N: torch.Tensor | None = None

    def to(self, device: torch.device) -> TeacherTargets:
        moved = tuple(tuple(f.to(device, non_blocking=True) for f in term) for term in self.features)
        excluded_N = None if self.excluded_N is None else self.excluded_N.to(device, non_blocking=True)
        return TeacherTargets(self.logits_NK.to(device, non_blocking=True), moved, excluded_N)


@dataclass(frozen=True)
class SparseTargets:
    """The teacher's next-token distribution at temperature 1, at N positions, as K kept tokens of a vocabulary each.

    weights_NK: float32, what each kept token counts for: its probability divided by that of its being kept. A slot
    that is not used has weight 0 and any id. An id may stand twice; its weights add up.
    exact_NK: which tokens were kept for certain, so that the weight is the probability itself.
    probs_NK: the probability of each kept token, where it is known for those that were drawn too.
    log_tail_N: the logarithm of the mass of all tokens that were not kept, for targets that were cut and not drawn;
    kept weights and tail then sum to 1. Where it is None the weights alone do.
    entropy_N: of the whole distribution, in nats, where it is known; without it a KL lacks this constant.
    """

    ids_NK: torch.Tensor
    weights_NK: torch.Tensor
    exact_NK: torch.Tensor
    probs_NK: torch.Tensor | None = None
    log_tail_N: torch.Tensor | None = None
    entropy_N: torch.Tensor | None = None

    def select(self, positions: torch.Tensor) -> SparseTargets:
        """These positions, by index or by mask, on their device."""
        return replace(self, **{name: part[positions] for name, part in self._parts()})

    def to(self, device: torch.device) -> SparseTargets:
        return replace(self, **{name: part.to(device, non_blocking=True) for name, part in self._parts()})

    @classmethod
    def joined(cls, chunks: Sequence[SparseTargets]) -> SparseTargets:
        """One after the other; all of them have the same fields and K, and there is one at least."""
        columns = [dict(chunk._parts()) for chunk in chunks]
        return replace(chunks[0], **{name: torch.cat([column[name] for column in columns]) for name in columns[0]})

    def _parts(self) -> list[tuple[str, Any]]:
        """What is there, by name."""
        parts = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, part) for name, part in parts if part is not None]


@dataclass(frozen=True)
class OutputHead:
    """A language model's last layer: logits are softcap * tanh(scale * (weight hidden + bias) / softcap).

    weight_VD and bias_V in the model's own dtype. Most models have neither bias nor softcap and scale 1; Gemma 2 caps
    its logits, Granite and Cohere scale them.
    """

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def to(self, device: torch.device) -> OutputHead:
        bias_V = None if self.bias_V is None else self.bias_V.to(device)
        return replace(self, weight_VD=self.weight_VD.to(device), bias_V=bias_V)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """(N, V) float32."""
        return self.from_products(self.products(hidden_ND))

    def products(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """(N, V), taken in the weight's dtype, but float16's in float32, which it may leave."""
        wide = torch.float32 if self.weight_VD.dtype == torch.float16 else self.weight_VD.dtype
        return hidden_ND.to(wide) @ self.weight_VD.to(wide).T

    def from_products(self, products_NV: torch.Tensor) -> torch.Tensor:
        """Logits, (N, V) float32, of products that nobody else needs."""
        logits_NV = products_NV.float()
        if self.bias_V is not None:
            logits_NV += self.bias_V.float()
        if self.scale != 1:
            logits_NV *= self.scale
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV


@dataclass(frozen=True)
class HiddenTargets:
    """The teacher's last hidden states at N positions (its width is its own) and the head that makes logits of them."""

    hidden_ND: torch.Tensor
    head: OutputHead


@dataclass(frozen=True)
class SpanTargets:
    """Spans of text that end at tokens of both tokenizers, for a student with another one than its teacher's.

    Span j is the student's positions from begins_J on up to before ends_J, rising and apart from each other;
    logprobs_J (float32) is the logarithm of the probability that the teacher gives to the text that stands there.
    """

    begins_J: torch.Tensor
    ends_J: torch.Tensor
    logprobs_J: torch.Tensor

    def to(self, device: torch.device) -> SpanTargets:
        parts = (self.begins_J, self.ends_J, self.logprobs_J)
        return SpanTargets(*(part.to(device, non_blocking=True) for part in parts))

    def within(self, begin: int, end: int) -> SpanTargets:
        """The spans of the positions from `begin` up to before `end`, counted from there; none lies across."""
        here_J = (self.begins_J >= begin) & (self.ends_J <= end)
        return SpanTargets(self.begins_J[here_J] - begin, self.ends_J[here_J] - begin, self.logprobs_J[here_J])


@dataclass(frozen=True)
class RankTargets:
    """The teacher's distributions where both tokenizers have written the same text, M of them.

    places_M are the student's positions there, rising; `teacher` has a position for each of them.
    """

    places_M: torch.Tensor
    teacher: SparseTargets | HiddenTargets | torch.Tensor

    def to(self, device: torch.device) -> RankTargets:
        """On the device, but for a teacher's output head, which its owner moves once."""
        teacher = self.teacher
        if isinstance(teacher, HiddenTargets):
            moved: SparseTargets | HiddenTargets | torch.Tensor = replace(
                teacher, hidden_ND=teacher.hidden_ND.to(device, non_blocking=True)
            )
        else:
            moved = teacher.to(device)
        return RankTargets(self.places_M.to(device, non_blocking=True), moved)

    def within(self, begin: int, end: int) -> RankTargets:
        """Those of the positions from `begin` up to before `end`, counted from there."""
        here_M = (self.places_M >= begin) & (self.places_M < end)
        teacher = self.teacher
        if isinstance(teacher, SparseTargets):
            cut: SparseTargets | HiddenTargets | torch.Tensor = teacher.select(here_M)
        elif isinstance(teacher, HiddenTargets):
            cut = replace(teacher, hidden_ND=teacher.hidden_ND[here_M])
        else:
            cut = teacher[here_M]
        return RankTargets(self.places_M[here_M] - begin, cut)
