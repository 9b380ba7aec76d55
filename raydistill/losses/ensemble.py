"""The mean of several teachers' outputs, as logits that a student can learn from.

Shapes: N rows, K classes.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn.functional import logsigmoid

Combine = Literal["logits", "probabilities"]


def ensemble_logits(
    members_NK: Sequence[torch.Tensor], weights: Sequence[float], *, combine: Combine, multi_label: bool = False
) -> torch.Tensor:
    """float32 logits (N, K) whose softmax (multi_label: sigmoid) is the weighted mean of the members.

    combine "logits": the mean of the logits, which is the normalised geometric mean of the probabilities (a logarithmic
    opinion pool). "probabilities": the logarithm of the arithmetic mean of the probabilities; multi_label: log p -
    log(1 - p) of the mean p. Hinton et al. 2015, arXiv:1503.02531, section 1, name both for ensembles of teachers.
    Weights are divided by their sum. Computed in float64. Raises ValueError for weights that are negative, all zero or
    not one for each member, and for members of different shapes.
    """
    if len(members_NK) != len(weights) or not weights:
        raise ValueError(f"expected a weight for each of {len(members_NK)} teachers, found {list(weights)}")
    if min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"weights must not be negative and not all zero, found {list(weights)}")
    if len({member.shape for member in members_NK}) > 1:
        raise ValueError(f"the teachers' outputs differ in shape: {[tuple(member.shape) for member in members_NK]}")
    members_MNK = torch.stack([member.double() for member in members_NK])
    shares_M11 = (torch.tensor(list(weights), dtype=torch.float64) / sum(weights)).reshape(-1, 1, 1)
    if combine == "logits":
        return (shares_M11 * members_MNK).sum(dim=0).float()
    if multi_label:
        yes_NK, no_NK = (_log_mean(logsigmoid(side), shares_M11) for side in (members_MNK, -members_MNK))
        return (yes_NK - no_NK).float()
    return _log_mean(torch.log_softmax(members_MNK, dim=-1), shares_M11).float()


def _log_mean(log_probs_MNK: torch.Tensor, shares_M11: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(log_probs_MNK + shares_M11.log(), dim=0)
