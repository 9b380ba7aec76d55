"""Losses of several students at once against each one's own objective."""

import pytest
import torch

from raydistill.losses.objective import Objective
from raydistill.losses.stacked import Targets, forward_kl_sums, groups_of, stacked_losses
from raydistill.targets import TeacherTargets

ROWS, CLASSES = 5, 7
OBJECTIVES = [
    Objective(temperature=4.0, alpha=0.9),
    Objective(temperature=1.5, alpha=0.2),
    Objective(),
    Objective(temperature=2.0, alpha=0.0, always_response=True),
    Objective(temperature=2.0, alpha=1.0),
    Objective(temperature=3.0, alpha=0.5, standardise=True),
    Objective(temperature=5.0, alpha=0.6, standardise=True),
    Objective(temperature=3.0, alpha=0.5, label_smoothing=0.2),
    Objective(temperature=2.5, alpha=0.4, label_smoothing=0.2),
    Objective(alpha=0.5, hard_targets="teacher", temperature=2.0),
    Objective(alpha=0.1, hard_targets="teacher", temperature=7.0),
    Objective(hard_targets="teacher"),
    Objective(hard_targets="teacher"),
    Objective(kind="reverse_kl", temperature=2.0, alpha=0.5),
    Objective(kind="dist", temperature=2.0, alpha=0.5),
    Objective(kind="dkd", temperature=2.0, alpha=0.5, parameters={"non_target_weight": 2.0}),
    Objective(kind="logit_mse", alpha=0.3),
]


def targets(seed: int) -> Targets:
    torch.manual_seed(seed)
    labels = torch.randint(0, CLASSES, (ROWS,))
    labels[seed % ROWS] = -100
    return Targets(labels, TeacherTargets(3 * torch.randn(ROWS, CLASSES)))


@pytest.mark.parametrize("batches", [1, 3])
def test_each_member_has_the_loss_the_parts_and_the_gradient_of_its_own_objective(batches: int):
    theirs = [targets(seed) for seed in range(batches)]
    of = [number % batches for number in range(len(OBJECTIVES))]
    torch.manual_seed(9)
    logits = (2 * torch.randn(len(OBJECTIVES), ROWS, CLASSES)).requires_grad_()
    losses, parts = stacked_losses(OBJECTIVES, logits, theirs, of)
    (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), logits)
    for number, objective in enumerate(OBJECTIVES):
        mine = theirs[of[number]]
        alone = logits[number].detach().requires_grad_()
        loss, expected = objective(alone, mine.labels, mine.teacher)
        torch.testing.assert_close(losses[number], loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient[number], torch.autograd.grad(loss, alone)[0], rtol=1e-4, atol=1e-5)
        assert list(parts[number]) == list(expected) == list(objective.part_names)
        for name, value in expected.items():
            torch.testing.assert_close(parts[number][name], value, rtol=1e-5, atol=1e-5)


def test_sets_of_labels_are_computed_one_by_one():
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (ROWS, CLASSES))
    theirs = Targets(labels, TeacherTargets(torch.randn(ROWS, CLASSES)))
    objectives = [Objective(kind="binary_kl", temperature=t, alpha=0.5) for t in (1.0, 2.0)]
    logits = torch.randn(2, ROWS, CLASSES)
    losses, _ = stacked_losses(objectives, logits, [theirs], [0, 0])
    for number, objective in enumerate(objectives):
        torch.testing.assert_close(losses[number], objective(logits[number], labels, theirs.teacher)[0])


def test_members_of_one_form_are_one_group():
    members = [
        Objective(temperature=2.0, alpha=0.5),
        Objective(),
        Objective(temperature=8.0, alpha=0.1),
        Objective(kind="dist", alpha=0.5),
        Objective(label_smoothing=0.1),
    ]
    assert groups_of(members) == [[0, 2], [1], [3], [4]]


def test_a_teacher_that_is_missing_and_a_temperature_of_zero_are_refused():
    members = [Objective(alpha=0.5, temperature=t) for t in (1.0, 2.0)]
    with pytest.raises(ValueError, match="needs the teacher's logits and the batch carries none"):
        stacked_losses(members, torch.zeros(2, ROWS, CLASSES), [Targets(targets(0).labels, None)], [0, 0])
    with pytest.raises(ValueError, match="temperature must be positive, found 0"):
        forward_kl_sums(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), temperatures=[0.0])
