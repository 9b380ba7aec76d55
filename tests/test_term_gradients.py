"""The sizes of the terms' gradients: against closed forms, and as the curves show them."""

import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from run_files import equal, points, student_weights

from raydistill.losses.feature_objective import FeatureTerm
from raydistill.losses.objective import Objective
from raydistill.losses.term_gradients import gradient_squares
from raydistill.targets import TeacherTargets

pytestmark = pytest.mark.xdist_group("small_runs")


def case(seed: int, rows: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The student's logits, labels of which some are missing, and the teacher's logits."""
    random = torch.Generator().manual_seed(seed)
    ours, theirs = (3 * torch.randn(rows, classes, generator=random) for _ in range(2))
    labels = torch.randint(-1, classes, (rows,), generator=random)
    return ours, torch.where(labels < 0, -100, labels), theirs


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(2, 7), st.floats(0.5, 8), st.floats(0, 1))
def test_cross_entropy_and_kl_pull_as_their_closed_forms_say(
    seed: int, rows: int, classes: int, temperature: float, alpha: float
):
    ours, labels, theirs = case(seed, rows, classes)
    objective = Objective(temperature=temperature, alpha=alpha)
    found = gradient_squares(objective, ours, labels, TeacherTargets(theirs)).tolist()
    # Of cross-entropy p - y (0 without a label), of T^2 KL(teacher || student) T (p_T - q_T).
    y = np.zeros((rows, classes))
    for row, label in enumerate(labels.tolist()):
        y[row, label if label >= 0 else 0] = label >= 0
    hard = (torch.softmax(ours.double(), dim=1).numpy() - y) * (labels.numpy() >= 0)[:, None]
    soft = (
        torch.softmax(ours.double() / temperature, dim=1) - torch.softmax(theirs.double() / temperature, dim=1)
    ).numpy()
    expected = [((1 - alpha) ** 2) * (hard**2).sum()]
    expected += [alpha**2 * temperature**2 * (soft**2).sum()] if alpha > 0 else []
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_feature_term_pulls_at_its_features_with_its_weight():
    ours, labels, theirs = case(0, 3, 5)
    student, teacher = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)  # two pairs of layers
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    term = FeatureTerm("hidden_mse", 2.5, ((0, 0), (1, 1)), None, "hidden_mse")
    objective = Objective(alpha=0.5, features=(term,))
    found = gradient_squares(
        objective, ours, labels, TeacherTargets(theirs, features=(tuple(teacher),)),
        student_features=(tuple(student),), mask_NL=mask,
    )  # fmt: skip
    # The mean over the pairs of the mean over real tokens and width.
    slopes = 2.5 / 2 * 2 * (student - teacher) * mask[..., None] / (mask.sum(dim=1)[:, None, None] * 6)
    assert found[2].item() == pytest.approx(slopes.square().sum().item(), rel=1e-5)
    without = gradient_squares(Objective(alpha=0.5), ours, labels, TeacherTargets(theirs))
    torch.testing.assert_close(found[:2], without)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "reverse_kl", "total_variation"])
def test_micro_batches_add_up_and_leave_no_gradient_behind(kind: str):
    ours, labels, theirs = case(1, 6, 5)
    ours.requires_grad_()
    objective = Objective(temperature=2.0, alpha=0.7, kind=kind)
    whole = gradient_squares(objective, ours, labels, TeacherTargets(theirs))
    halves = [
        gradient_squares(objective, ours[i], labels[i], TeacherTargets(theirs[i])) for i in (slice(2), slice(2, 6))
    ]
    torch.testing.assert_close(sum(halves), whole, rtol=1e-5, atol=1e-9)
    assert ours.grad is None
    assert not whole.requires_grad


def test_a_batch_without_labels_has_no_pull_from_cross_entropy():
    ours, labels, theirs = case(2, 4, 3)
    found = gradient_squares(Objective(alpha=0.5), ours, torch.full_like(labels, -100), TeacherTargets(theirs))
    assert found[0] == 0
    assert found[1] > 0


def test_the_curves_show_each_terms_gradient_and_the_training_is_the_same(runs):
    features = [{"kind": "hidden_mse"}, {"kind": "value_relation", "relation_heads": 4}]
    changes = {"train.loss.features": features, "student.hidden_size": 8}
    often, answer = runs.trained({**changes, "train.log_every": 1})
    assert answer["error"] is None
    seldom, _ = runs.trained({**changes, "train.log_every": 1000})
    assert equal(student_weights(often), student_weights(seldom))
    names = ["cross_entropy", "kl", "hidden_mse", "value_relation"]
    for folder, count in ((often, 8), (seldom, 4)):
        curve = points(folder, "train")
        shown = [point for point in curve if "grad_norm/kl" in point]
        assert len(curve) == count
        # Every step, or the last ones of the epochs alone: a checkpoint's point has none.
        assert len(shown) == (8 if folder == often else 2)
        assert all(
            point[f"grad_norm/{name}"] > 0 and math.isfinite(point[f"grad_norm/{name}"])
            for point in shown
            for name in names
        )
    assert tags(often) >= {f"train/grad_norm/{name}" for name in names} | {"train/grad_norm", "train/kl_max"}
    # Of a row's cross-entropy the gradient is p - y, times 0.1: the root of the mean square is between 0 and that of 2.
    assert 0 < points(often, "train")[0]["grad_norm/cross_entropy"] < 0.1 * 2**0.5


def tags(folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: Any = EventAccumulator(str(folder / "train/tensorboard"))
    events.Reload()
    return set(events.Tags()["scalars"])
