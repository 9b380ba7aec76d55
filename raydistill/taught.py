"""Both sides of a training with feature terms: the student with its projections, and the teacher beside it.

Shapes: N rows, L tokens, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from raydistill.feature_tap import FeatureTap
from raydistill.losses.feature_objective import STUDENT, TEACHER, FeatureTerm, needed
from raydistill.losses.projections import Projections

STUDENT_PREFIX = "student."


class TaughtStudent(torch.nn.Module):
    """A student that hands over its features, at the teacher's width, with its logits.

    The projections are made here, trained with the student and no part of what is saved (`student_weights`). The
    features come out of `forward` itself, so that under ZeRO-3 every weight is used while it is gathered.
    """

    def __init__(self, student: Any, terms: Sequence[FeatureTerm], *, teacher_width: int, seed: int) -> None:
        super().__init__()
        self.student, self._terms = student, tuple(terms)
        pair = (student.config.hidden_size, teacher_width)
        self.projections = Projections([pair for t in terms if t.definition.projected for _ in t.pairs], seed=seed)
        self._tap = FeatureTap(student, **needed(terms, STUDENT))
        self._tap.__enter__()

    def forward(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits (N, K) and, in training, the features of all terms and pairs, one after the other."""
        logits_NK = self.student(**inputs).logits
        features = self._tap.take()
        if not self.training:
            return (logits_NK,)
        found: list[torch.Tensor] = []
        number = 0
        for term in self._terms:
            for feature in term.select(features, STUDENT, inputs["attention_mask"]):
                if term.definition.projected:
                    feature = self.projections(number, feature)
                    number += 1
                found.append(feature)
        return (logits_NK, *found)

    def grouped(self, features: Sequence[torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], ...]:
        """The features behind the logits, by term and pair."""
        groups, start = [], 0
        for term in self._terms:
            groups.append(tuple(features[start : start + len(term.pairs)]))
            start += len(term.pairs)
        return tuple(groups)

    def gradient_checkpointing_enable(self) -> None:
        self.student.gradient_checkpointing_enable()

    def close(self) -> None:
        self._tap.__exit__()


def student_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The student's own weights among those of a TaughtStudent, by the names that the student has for them."""
    return {n.removeprefix(STUDENT_PREFIX): v for n, v in weights.items() if n.startswith(STUDENT_PREFIX)}


class FeatureTeacher:
    """The teacher inside a training worker: frozen, in eval mode, run for its features alone.

    `token_ids` gives, for every token id of the student, the teacher's id of the same token, where they differ.
    """

    def __init__(
        self, model: Any, terms: Sequence[FeatureTerm], *, device: torch.device, token_ids: torch.Tensor | None = None
    ) -> None:
        self._model = model.to(device).eval().requires_grad_(False)
        self._device, self._terms = device, tuple(terms)
        self._token_ids = None if token_ids is None else token_ids.to(device)
        self._tap = FeatureTap(self._model, **needed(terms, TEACHER))
        self._tap.__enter__()

    @torch.no_grad()
    def features(self, inputs: dict[str, torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], ...]:
        """What each term compares, by term and pair."""
        inputs = {name: value.to(self._device) for name, value in inputs.items()}
        if self._token_ids is not None:
            inputs["input_ids"] = self._token_ids[inputs["input_ids"]]
        self._model.base_model(**inputs)
        found = self._tap.take()
        return tuple(tuple(term.select(found, TEACHER, inputs["attention_mask"])) for term in self._terms)

    def close(self) -> None:
        self._tap.__exit__()
