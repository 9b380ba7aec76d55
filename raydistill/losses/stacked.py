"""The objectives of several students at once: each student's loss is what its own objective gives.

Members whose objectives are of one form, forward KL and cross-entropy, are computed together, with a temperature and a
share for each; a member with another response loss is computed by its objective alone.

Shapes: M members, B batches, N rows, K classes, P parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from raydistill.losses.objective import Objective
from raydistill.losses.response import IGNORED_LABEL, check_temperature, teacher_labels
from raydistill.losses.transforms import standardise
from raydistill.targets import TeacherTargets

TOGETHER = ("forward_kl",)


@dataclass(frozen=True)
class Targets:
    """What a batch's students learn from: labels_N (or N x K for sets of labels) and the teacher's outputs."""

    labels: torch.Tensor
    teacher: TeacherTargets | None


def groups_of(objectives: Sequence[Objective]) -> list[list[int]]:
    """The members whose losses are computed together, by their numbers; each member is in one group."""
    found: dict[object, list[int]] = {}
    for number, o in enumerate(objectives):
        together = o.kind in TOGETHER and not o.features
        form = (o.standardise, o.label_smoothing, o.hard_targets, o.has_response) if together else number
        found.setdefault(form, []).append(number)
    return list(found.values())


def stacked_losses(
    objectives: Sequence[Objective], logits_MNK: torch.Tensor, targets: Sequence[Targets], batch_of: Sequence[int]
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Every member's loss summed over its rows, with gradient, and its parts, as the member's `Objective` gives them.

    `targets` are those of each batch and `batch_of` names every member's. Raises ValueError where an objective does.
    """
    losses: list[torch.Tensor] = [logits_MNK.new_zeros(())] * len(objectives)
    parts: list[dict[str, torch.Tensor]] = [{}] * len(objectives)
    for members in groups_of(objectives):
        first = objectives[members[0]]
        if len(members) == 1:
            mine = targets[batch_of[members[0]]]
            losses[members[0]], parts[members[0]] = first(logits_MNK[members[0]], mine.labels, mine.teacher)
            continue
        chosen = logits_MNK if len(members) == len(objectives) else logits_MNK[members]
        theirs = [targets[b] for b in sorted({batch_of[m] for m in members})]
        place = {b: n for n, b in enumerate(sorted({batch_of[m] for m in members}))}
        found_PM = _together([objectives[m] for m in members], chosen, theirs, [place[batch_of[m]] for m in members])
        weights_PM = torch.tensor(
            [[1 - objectives[m].alpha for m in members], [objectives[m].alpha for m in members]], device=chosen.device
        )
        totals = (found_PM * weights_PM[: len(found_PM)]).sum(dim=0).unbind()
        for member, total, own in zip(members, totals, found_PM.detach().unbind(dim=1), strict=True):
            losses[member] = total
            parts[member] = dict(zip(first.part_names, own.unbind(), strict=True))
    return losses, parts


def _together(
    objectives: Sequence[Objective], logits_MNK: torch.Tensor, targets: Sequence[Targets], batch_of: Sequence[int]
) -> torch.Tensor:
    """Cross-entropy, and forward KL where there is a response, of every member, P x M, before weighting."""
    first, chosen = objectives[0], batch_of if len(targets) > 1 else [0]
    teacher_MNK = None
    if first.needs_teacher:
        if any(t.teacher is None for t in targets):
            raise ValueError(f"alpha {first.alpha} needs the teacher's logits and the batch carries none")
        teacher_BNK = torch.stack([t.teacher.logits_NK for t in targets if t.teacher is not None])
        teacher_MNK = teacher_BNK[chosen].float()
    if first.hard_targets == "teacher":
        assert teacher_MNK is not None
        labels_MN = teacher_labels(teacher_MNK)
    else:
        labels_MN = torch.stack([t.labels for t in targets])[chosen]
    found = [_cross_entropies(logits_MNK, labels_MN, first.label_smoothing)]
    if first.has_response:
        assert teacher_MNK is not None
        temperatures = [o.temperature for o in objectives]
        sides = (teacher_MNK, logits_MNK)
        if first.standardise:
            sides = (standardise(teacher_MNK), standardise(logits_MNK))
        found.append(forward_kl_sums(*sides, temperatures=temperatures))
    return torch.stack(found)


def forward_kl_sums(
    teacher_MNK: torch.Tensor, student_MNK: torch.Tensor, *, temperatures: Sequence[float]
) -> torch.Tensor:
    """`forward_kl_sum` of every member at its own temperature, M; a first dimension of 1 is all members' teacher.

    Raises ValueError for a temperature that is not positive.
    """
    for temperature in temperatures:
        check_temperature(temperature)
    temperature_M = torch.tensor(temperatures, device=student_MNK.device)
    by = temperature_M.view(-1, 1, 1)
    teacher_logprobs = F.log_softmax(teacher_MNK.detach().float() / by, dim=-1)
    student_logprobs = F.log_softmax(student_MNK.float() / by, dim=-1)
    ratio = teacher_logprobs - student_logprobs
    return ratio.mul_(teacher_logprobs.exp_()).sum(dim=(1, 2)) * temperature_M**2


def _cross_entropies(logits_MNK: torch.Tensor, labels_MN: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    members, rows, classes = logits_MNK.shape
    losses = F.cross_entropy(
        logits_MNK.float().view(-1, classes), labels_MN.expand(members, rows).reshape(-1), reduction="none",
        ignore_index=IGNORED_LABEL, label_smoothing=label_smoothing,
    )  # fmt: skip
    return losses.view(members, rows).sum(dim=1)
