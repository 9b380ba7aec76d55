"""Every response loss by the name that a config gives it, with what it takes and what it needs.

Shapes: N rows, K classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from raydistill.losses.correlation import dist_sum
from raydistill.losses.decoupled import decoupled_kl_sum
from raydistill.losses.multilabel import binary_jsd_sum, binary_kl_sum, binary_reverse_kl_sum
from raydistill.losses.response import (
    forward_kl_sum,
    generalised_jsd_sum,
    logit_mse_sum,
    reverse_kl_sum,
    skew_forward_kl_sum,
    skew_reverse_kl_sum,
    total_variation_sum,
)


@dataclass(frozen=True)
class Parameter:
    """A hyper-parameter of a loss: its default, its bounds (inclusive, but for an open maximum) and its meaning."""

    default: float
    minimum: float
    maximum: float
    description: str
    open_maximum: bool = False

    def allows(self, value: float) -> bool:
        below = value < self.maximum if self.open_maximum else value <= self.maximum
        return self.minimum <= value and below

    @property
    def bounds(self) -> str:
        """The bounds as an interval: [0, 1) leaves 1 out."""
        return f"[{self.minimum:g}, {self.maximum:g}{')' if self.open_maximum else ']'}"


@dataclass(frozen=True)
class ResponseLoss:
    """A loss on the teacher's and the student's logits, what it takes and what it needs.

    needs_labels: takes labels_N. needs_all_classes: a target that holds some classes only, or a sample of them, does
    not do; forward KL alone is linear in the teacher's probabilities. row_separable: the loss of a batch is the sum
    of the losses of its parts. multi_label: for rows with several classes or none. part: its name among the parts
    that an objective reports, the kind where it is empty.
    """

    function: Callable[..., torch.Tensor]
    parameters: Mapping[str, Parameter] = field(default_factory=dict[str, Parameter])
    uses_temperature: bool = True
    needs_labels: bool = False
    needs_all_classes: bool = True
    row_separable: bool = True
    multi_label: bool = False
    part: str = ""

    def resolved(self, values: Mapping[str, float]) -> dict[str, float]:
        """Every parameter's value, the default where none is given.

        Raises ValueError for one that the loss does not have and for one out of its bounds.
        """
        for name, value in values.items():
            if name not in self.parameters:
                known = ", ".join(self.parameters) or "none"
                raise ValueError(f"{name} is no parameter of this loss, which has {known}; remove it")
            if not self.parameters[name].allows(value):
                raise ValueError(f"{name} must be in {self.parameters[name].bounds}, found {value}")
        return {name: values.get(name, parameter.default) for name, parameter in self.parameters.items()}

    def __call__(
        self,
        teacher_logits_NK: torch.Tensor,
        student_logits_NK: torch.Tensor,
        labels_N: torch.Tensor,
        *,
        temperature: float,
        parameters: Mapping[str, float],
    ) -> torch.Tensor:
        """The loss summed over rows; labels and temperature reach it if it takes them, parameters as it resolves."""
        inputs = (teacher_logits_NK, student_logits_NK, *((labels_N,) if self.needs_labels else ()))
        tempered = {"temperature": temperature} if self.uses_temperature else {}
        return self.function(*inputs, **tempered, **self.resolved(parameters))


_BETA = {"beta": Parameter(0.5, 0, 1, "share of the teacher in the mixture; 0 is forward KL, 1 is reverse KL")}
# DistiLLM's own default, arXiv:2402.03898, section 4.
_SKEW = {"skew": Parameter(0.1, 0, 1, "share of the loss's own first side in the mixture", open_maximum=True)}
# The paper's weights on CIFAR-100, arXiv:2203.08679, appendix; 0.5 for non_target_weight on ImageNet.
_DKD = {
    "target_weight": Parameter(1.0, 0, 1000, "weight of the target class against the others (the paper's alpha)"),
    "non_target_weight": Parameter(8.0, 0, 1000, "weight of the other classes among themselves (the paper's beta)"),
}
# The paper's weights, arXiv:2205.10536, section 5.
_DIST = {
    "inter_weight": Parameter(2.0, 0, 1000, "weight of each row's correlation over classes (the paper's beta)"),
    "intra_weight": Parameter(2.0, 0, 1000, "weight of each class's correlation over rows (the paper's gamma)"),
}

RESPONSE_LOSSES: Mapping[str, ResponseLoss] = {
    "forward_kl": ResponseLoss(forward_kl_sum, needs_all_classes=False, part="kl"),
    "reverse_kl": ResponseLoss(reverse_kl_sum),
    "jsd": ResponseLoss(generalised_jsd_sum, _BETA),
    "skew_forward_kl": ResponseLoss(skew_forward_kl_sum, _SKEW),
    "skew_reverse_kl": ResponseLoss(skew_reverse_kl_sum, _SKEW),
    "total_variation": ResponseLoss(total_variation_sum),
    "logit_mse": ResponseLoss(logit_mse_sum, uses_temperature=False),
    "dkd": ResponseLoss(decoupled_kl_sum, _DKD, needs_labels=True),
    "dist": ResponseLoss(dist_sum, _DIST, row_separable=False),
    "binary_kl": ResponseLoss(binary_kl_sum, multi_label=True),
    "binary_reverse_kl": ResponseLoss(binary_reverse_kl_sum, multi_label=True),
    "binary_jsd": ResponseLoss(binary_jsd_sum, _BETA, multi_label=True),
}
