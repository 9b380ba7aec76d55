"""Temperature and alpha that change from step to step."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_files import equal, facts, points, student_weights
from test_training import STEPS

from raydistill.losses.courses import Course
from raydistill.losses.objective import Objective
from raydistill.targets import TeacherTargets

pytestmark = pytest.mark.xdist_group("small_runs")
STILL = {"train.learning_rate": 1e-9, "student.dropout": 0.0, "train.log_every": 1}  # no weight moves to speak of


def test_a_line_and_half_a_cosine_by_hand():
    line, cosine = Course(4.0, 1.0), Course(4.0, 1.0, "cosine")
    assert [line.at(step, 4) for step in range(4)] == pytest.approx([4, 3, 2, 1])
    # 1 - cos(60°) = 0.5 and 1 - cos(120°) = 1.5, halved: a quarter and three quarters of the way.
    assert [cosine.at(step, 4) for step in range(4)] == pytest.approx([4, 3.25, 1.75, 1])
    assert line.at(0, 1) == 4.0


@given(
    st.floats(0.0, 1000.0), st.floats(0.0, 1000.0), st.sampled_from(["linear", "cosine"]), st.integers(2, 200),
    st.data(),
)  # fmt: skip
def test_a_course_has_its_ends_and_never_leaves_them(start: float, end: float, shape: Any, total: int, data):
    course, step = Course(start, end, shape), data.draw(st.integers(0, total - 2))
    assert course.at(0, total) == start
    assert course.at(total - 1, total) == pytest.approx(end)
    here, after = course.at(step, total), course.at(step + 1, total)
    assert min(start, end) <= here <= max(start, end)
    assert (after - here) * (end - start) >= -1e-9 * (1 + abs(end - start))


def test_alpha_0_on_the_way_keeps_the_response_loss_among_the_parts_and_out_of_the_sum():
    teacher, student, labels = torch.randn(5, 3), torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1, 2, 0, 1])
    loss, parts = Objective(temperature=2.0, always_response=True)(student, labels, TeacherTargets(teacher))
    (gradient,) = torch.autograd.grad(loss, student)
    alone, _ = Objective()(student, labels, None)
    assert set(parts) == {"cross_entropy", "kl"}
    assert loss.item() == pytest.approx(alone.item())
    torch.testing.assert_close(gradient, torch.autograd.grad(alone, student)[0])


@pytest.mark.parametrize("course", ["linear", "cosine"])
def test_temperature_and_alpha_follow_their_course_and_the_curves_say_so(runs, course: str):
    loss = {"temperature": 6.0, "temperature_end": 1.5, "alpha": 1.0, "alpha_end": 0.0, "course": course}
    changes = {**STILL, **{f"train.loss.{name}": value for name, value in loss.items()}}
    folder, answer = runs.trained(changes)
    assert answer["error"] is None
    curve = points(folder, "train")
    done = [n / (STEPS - 1) for n in range(STEPS)]
    if course == "cosine":
        done = [(1 - math.cos(math.pi * d)) / 2 for d in done]
    assert [p["temperature"] for p in curve] == pytest.approx([6.0 - 4.5 * d for d in done])
    assert [p["alpha"] for p in curve] == pytest.approx([1.0 - d for d in done], abs=1e-12)
    for point in curve:
        expected = point["alpha"] * point["kl"] + (1 - point["alpha"]) * point["cross_entropy"]
        assert point["loss"] == pytest.approx(expected, rel=1e-5)


def test_each_end_of_a_course_is_the_loss_at_that_temperature_and_validation_knows_of_none(runs):
    changing, answer = runs.trained({**STILL, "train.loss.temperature": 6.0, "train.loss.temperature_end": 1.5})
    assert answer["error"] is None
    curve = points(changing, "train")
    for temperature, step in ((6.0, 0), (1.5, STEPS - 1)):
        same, _ = runs.trained({**STILL, "train.loss.temperature": temperature})
        there = points(same, "train")[step]
        assert curve[step]["kl"] == pytest.approx(there["kl"], rel=1e-4)
        assert "temperature" not in there
        found, expected = points(changing, "validation")[-1], points(same, "validation")[-1]
        assert found["kl"] == pytest.approx(expected["kl"], rel=1e-4)


def test_a_course_that_ends_where_it_begins_changes_nothing(runs):
    plain, _ = runs.trained({"train.loss.temperature": 3.0})
    level, answer = runs.trained({"train.loss.temperature": 3.0, "train.loss.temperature_end": 3.0})
    assert answer["error"] is None
    assert equal(student_weights(level), student_weights(plain))


def test_a_training_with_courses_goes_on_after_a_kill_to_the_same_weights(runs):
    changes = {"train.loss.temperature_end": 1.0, "train.loss.alpha": 0.1, "train.loss.alpha_end": 0.9}
    whole, folder = runs.killed_training(changes)
    assert equal(student_weights(folder), student_weights(whole))
    assert points(folder, "train")[-1]["alpha"] == pytest.approx(0.9)
    assert facts(folder)["steps"] == STEPS
