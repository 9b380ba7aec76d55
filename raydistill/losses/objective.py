"""The objective of a training: which losses, with which weights.

Shapes: N rows, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from raydistill.losses.feature_objective import FeatureTerm
from raydistill.losses.multilabel import binary_cross_entropy_sum
from raydistill.losses.registry import RESPONSE_LOSSES, ResponseLoss
from raydistill.losses.response import check_label_smoothing, cross_entropy_sum, teacher_labels
from raydistill.losses.transforms import standardise
from raydistill.targets import TeacherTargets


@dataclass(frozen=True)
class Objective:
    """alpha * response loss + (1 - alpha) * cross-entropy with hard targets (Hinton et al. 2015, section 2) + features.

    kind and parameters name the response loss in RESPONSE_LOSSES; the default, forward KL, is
    temperature^2 * KL(teacher || student). standardise: the response loss sees standardised logits, the cross-entropy
    never does. hard_targets: the data's labels, or the teacher's most likely class of every row (for a multi-label
    loss, each class that the teacher finds likelier than not), which then are the labels of the response loss too.
    excludes: rows of `TeacherTargets.excluded_N` take no part in the response loss and the features, and learn from the
    data's labels alone, with a row's whole weight, as with alpha 0.
    features: terms that are added, each with its weight, so that neither alpha nor the temperature touches them. With
    alpha 0, the data's labels and no features no teacher is needed. For a multi-label loss labels are (N, K) and the
    cross-entropy is the binary one, summed over classes, also with alpha 0. always_response: the response loss is
    computed and reported also while alpha is 0, for an alpha that changes from step to step.

    Raises ValueError for an unknown kind, a parameter that the loss does not have or that is out of its bounds, and
    for a setting that the loss would ignore.
    """

    temperature: float = 1.0
    alpha: float = 0.0
    kind: str = "forward_kl"
    parameters: Mapping[str, float] = field(default_factory=dict[str, float])
    standardise: bool = False
    label_smoothing: float = 0.0
    hard_targets: Literal["labels", "teacher"] = "labels"
    features: tuple[FeatureTerm, ...] = ()
    always_response: bool = False
    excludes: bool = False

    def __post_init__(self) -> None:
        if self.kind not in RESPONSE_LOSSES:
            raise ValueError(f"kind must be one of {', '.join(RESPONSE_LOSSES)}, found {self.kind!r}")
        try:
            self.response.resolved(self.parameters)
        except ValueError as error:
            raise ValueError(f"{self.kind}: {error}") from None
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, found {self.alpha}")
        check_label_smoothing(self.label_smoothing)
        if not self.response.uses_temperature and self.temperature != 1:
            raise ValueError(f"{self.kind} takes no temperature, found {self.temperature}; leave it at 1")
        if self.standardise and self.response.multi_label:
            raise ValueError(f"standardise moves the logit at which {self.kind} says yes or no; leave it out")
        if self.hard_targets not in ("labels", "teacher"):
            raise ValueError(f"hard_targets must be labels or teacher, found {self.hard_targets!r}")

    @property
    def response(self) -> ResponseLoss:
        return RESPONSE_LOSSES[self.kind]

    @property
    def has_response(self) -> bool:
        return self.alpha > 0 or self.always_response

    @property
    def needs_teacher(self) -> bool:
        return self.has_response or self.hard_targets == "teacher" or bool(self.features)

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of the parts that every call reports, in their order."""
        response = (self.response.part or self.kind,) if self.has_response else ()
        excluded = ("excluded_cross_entropy",) if self.excludes else ()
        return ("cross_entropy", *response, *excluded, *(term.name or term.kind for term in self.features))

    def __call__(
        self,
        student_logits_NK: torch.Tensor,
        labels_N: torch.Tensor,
        teacher: TeacherTargets | None,
        *,
        student_features: Sequence[Sequence[torch.Tensor]] = (),
        mask_NL: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss summed over rows, and its parts before weighting, also sums, detached.

        student_features are what the student has for each feature term, as TeacherTargets.features is of the teacher,
        and mask_NL says which tokens are real. The parts are "cross_entropy", the response loss by its kind (forward
        KL as "kl", which includes the square of the temperature) and the feature terms by their names. KL at
        temperature 1 is not computed beside another loss: it would cost a second pass over all classes in each step,
        and validation reports it.

        A row without a label (-100) adds to the response loss only. The caller divides by the count of all rows, so
        every row weighs alpha in the response loss, and the cross-entropy's share falls with that of labelled rows.
        Raises ValueError when the teacher is needed and there is none.
        """
        terms = self.terms(student_logits_NK, labels_N, teacher, student_features=student_features, mask_NL=mask_NL)
        parts = {name: loss.detach() for name, (_, loss) in zip(self.part_names, terms, strict=True)}
        total = terms[0][1] if len(terms) == 1 else sum(weight * loss for weight, loss in terms)
        return torch.as_tensor(total), parts

    def terms(
        self,
        student_logits_NK: torch.Tensor,
        labels_N: torch.Tensor,
        teacher: TeacherTargets | None,
        *,
        student_features: Sequence[Sequence[torch.Tensor]] = (),
        mask_NL: torch.Tensor | None = None,
    ) -> list[tuple[float, torch.Tensor]]:
        """Every part's weight and its sum over rows before weighting, with gradient, in the order of `part_names`."""
        if self.needs_teacher and teacher is None:
            others = "hard_targets teacher" if self.hard_targets == "teacher" else "features"
            wants = f"alpha {self.alpha}" if self.has_response else others
            raise ValueError(f"{wants} needs the teacher's logits and the batch carries none")
        if self.excludes:
            return self._terms_without(student_logits_NK, labels_N, teacher, student_features, mask_NL)
        if teacher is not None and self.hard_targets == "teacher":
            labels_N = self._labels_of(teacher)
        terms = [(1 - self.alpha, self._cross_entropy(student_logits_NK, labels_N))]
        if self.has_response:
            assert teacher is not None
            terms.append((self.alpha, self._response(teacher, student_logits_NK, labels_N)))
        if self.features:
            assert teacher is not None
            assert mask_NL is not None
            for term, theirs, ours in zip(self.features, teacher.features, student_features, strict=True):
                terms.append((term.weight, term.sum(theirs, ours, mask_NL)))
        return terms

    def _terms_without(
        self,
        student_logits_NK: torch.Tensor,
        labels_N: torch.Tensor,
        teacher: TeacherTargets | None,
        student_features: Sequence[Sequence[torch.Tensor]],
        mask_NL: torch.Tensor | None,
    ) -> list[tuple[float, torch.Tensor]]:
        """The terms of the rows that are not excluded, and the cross-entropy of those that are."""
        assert teacher is not None
        assert teacher.excluded_N is not None
        rows_N = ~teacher.excluded_N
        theirs = tuple(tuple(part[rows_N] for part in term) for term in teacher.features)
        ours = tuple(tuple(part[rows_N] for part in term) for term in student_features)
        mask = None if mask_NL is None else mask_NL[rows_N]
        kept = TeacherTargets(teacher.logits_NK[rows_N], theirs)
        alone = self._cross_entropy(student_logits_NK[~rows_N], labels_N[~rows_N])
        if rows_N.any():
            terms = replace(self, excludes=False).terms(
                student_logits_NK[rows_N], labels_N[rows_N], kept, student_features=ours, mask_NL=mask
            )
        else:  # a mean over no rows is not a number
            nothing = [student_logits_NK.sum() * 0] * (1 + self.has_response)
            nothing += [torch.stack([part.sum() for part in term]).sum() * 0 for term in student_features]
            weights = [1 - self.alpha, *([self.alpha] * self.has_response), *(term.weight for term in self.features)]
            terms = list(zip(weights, nothing, strict=True))
        place = 1 + self.has_response
        return [*terms[:place], (1.0, alone), *terms[place:]]

    def _cross_entropy(self, student_logits_NK: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        hard_loss = binary_cross_entropy_sum if self.response.multi_label else cross_entropy_sum
        return hard_loss(student_logits_NK, labels_N, label_smoothing=self.label_smoothing)

    def _response(
        self, teacher: TeacherTargets, student_logits_NK: torch.Tensor, labels_N: torch.Tensor
    ) -> torch.Tensor:
        sides = (teacher.logits_NK, student_logits_NK)
        if self.standardise:
            sides = (standardise(sides[0]), standardise(sides[1]))
        return self.response(*sides, labels_N, temperature=self.temperature, parameters=self.parameters)

    def _labels_of(self, teacher: TeacherTargets) -> torch.Tensor:
        if self.response.multi_label:
            return (teacher.logits_NK > 0).float()
        return teacher_labels(teacher.logits_NK)
