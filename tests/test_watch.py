"""The watch over the distillation loss: constructed curves that call for a warning, and ordinary ones that do not."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_files import points

from raydistill.record.store import LocalStore
from raydistill.stages.curves import WatchedCurves
from raydistill.stages.progress import Progress
from raydistill.stages.trainer import _Reader
from raydistill.stages.watch import Alarm, Watch

pytestmark = pytest.mark.xdist_group("small_runs")
PER_EPOCH = 30  # points, of ten steps each


def curve(
    level: Callable[[int], float],
    *,
    count: int = 200,
    noise: float = 0.15,
    seed: int = 0,
    kl: Callable[[int], float] | None = None,
) -> list[dict[str, Any]]:
    """Points of a training whose loss has this level, with steps that scatter around it, and validations by epoch."""
    random, made = np.random.default_rng(seed), []
    for number in range(count):
        steps = level(number) * random.lognormal(sigma=noise, size=10)
        step = 10 * (number + 1)
        made.append(
            {
                "group": "train", "step": step, "kl": float(steps.mean()), "kl_max": float(steps.max()),
                "kl_max_step": step - 9 + int(steps.argmax()),
            }
        )  # fmt: skip
        if (number + 1) % PER_EPOCH == 0:
            made.append({"group": "validation", "step": step, "kl": (kl or level)(number) / 4})
    return made


def alarms(found: list[dict[str, Any]], **options: Any) -> list[Alarm]:
    watch = Watch("kl", "train.learning_rate 0.001, precision bf16", **options)
    return [alarm for point in found for alarm in watch.add(point)]


def falling(number: int) -> float:
    return 0.3 + 2 * math.exp(-number / 40)


def spike_at(points_: list[dict[str, Any]], number: int, factor: float) -> list[dict[str, Any]]:
    train = [point for point in points_ if point["group"] == "train"]
    train[number]["kl_max"] *= factor
    return points_


ORDINARY = {
    "falling": falling,
    "flat": lambda number: 0.5,
    "in steps, by epoch": lambda number: 1.0 / (1 + number // PER_EPOCH),
    "falling from very high": lambda number: 50 * math.exp(-number / 5) + 0.5,
    "up a little at a warm restart": lambda number: falling(number) * (1.25 if number % 60 > 50 else 1),
    "next to nothing, scattered": lambda number: 1e-4 * (1 + 5 * (number % 7 == 3)),
}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("noise", [0.02, 0.15, 0.6])
@pytest.mark.parametrize("course", ORDINARY)
def test_an_ordinary_course_gives_no_warning(course: str, noise: float, seed: int):
    assert alarms(curve(ORDINARY[course], noise=noise, seed=seed, count=600)) == []


def test_validation_that_falls_faster_than_training_with_dropout_gives_no_warning():
    assert alarms(curve(falling, kl=lambda number: 2 * math.exp(-number / 20) + 0.02)) == []


def test_overfitting_gives_no_warning():
    assert alarms(curve(lambda n: 2 * math.exp(-n / 40) + 0.02, kl=lambda n: 0.3 + n / 100)) == []


@pytest.mark.parametrize("noise", [0.02, 0.15, 0.6])
def test_a_spike_is_told_once_with_its_step_its_value_and_the_usual_one(noise: float):
    made = spike_at(curve(falling, noise=noise), 120, 8.0 * math.exp(4 * noise))
    (alarm,) = alarms(made)
    point = next(p for p in made if p["step"] == 1210)
    before = [p["kl_max"] for p in made if p["group"] == "train" and 1210 - 320 <= p["step"] < 1210]
    assert (alarm.kind, alarm.at, alarm.value) == ("spike", point["kl_max_step"], point["kl_max"])
    assert alarm.usual == pytest.approx(float(np.median(before)), rel=0.02)
    assert f"kl jumps to {alarm.value:.3g} at step {alarm.at:,}, where up to {alarm.usual:.3g} is usual" in alarm.text
    assert "Likely causes: odd rows in that batch, a learning rate" in alarm.text
    assert "(train.learning_rate 0.001, precision bf16)" in alarm.text
    assert "\n" not in alarm.text


def test_a_spike_that_lasts_is_told_once_and_another_one_again():
    made = curve(falling)
    for number in (100, 101, 102, 150):
        spike_at(made, number, 15.0)
    assert [(alarm.kind, (alarm.at - 1) // 10) for alarm in alarms(made)] == [("spike", 100), ("spike", 150)]


@pytest.mark.parametrize("steady", [True, False])
def test_a_rise_over_many_steps_is_told_once_unless_the_loss_itself_changes_its_meaning(steady: bool):
    made = curve(lambda n: falling(n) * (1 + max(0, n - 100) / 25), kl=falling)
    found = alarms(made, steady=steady)
    assert [alarm.kind for alarm in found] == (["drift"] if steady else []) or {a.kind for a in found} == {
        "drift",
        "apart",
    }
    if steady:
        drift = next(alarm for alarm in found if alarm.kind == "drift")
        assert 1000 < drift.at < 1500
        assert drift.usual < 0.55 < drift.value
        assert (
            f"kl has risen to {drift.value:.3g} by step {drift.at:,}, from {drift.usual:.3g} at its lowest"
            in drift.text
        )


def test_a_rise_that_is_over_may_begin_again():
    def waves(number: int) -> float:
        return 2.0 if 60 <= number < 90 or 140 <= number < 170 else 0.5

    found = [alarm.kind for alarm in alarms(curve(waves, kl=waves)) if alarm.kind == "drift"]
    assert found == ["drift", "drift"]


def test_training_that_leaves_validations_course_is_told():
    made = curve(lambda n: 0.5 if n < 150 else 0.75, kl=lambda n: 0.5 if n < 150 else 0.25, count=210)
    (alarm,) = alarms(made)
    assert (alarm.kind, alarm.at) == ("apart", 1800)
    assert "and validation's KL has not" in alarm.text


def test_what_is_warned_of_is_a_function_of_the_points():
    made = spike_at(curve(lambda n: falling(n) * (1 + max(0, n - 100) / 25)), 150, 20.0)
    whole = alarms(made)
    for stop in (50, 130, 152, 200):
        before, again = Watch("kl", ""), Watch("kl", "train.learning_rate 0.001, precision bf16")
        first = [alarm for point in made[:stop] for alarm in before.add(point)]
        for point in made[:stop]:
            again.add(point)
        rest = [alarm for point in made[stop:] for alarm in again.add(point)]
        assert [(a.kind, a.at) for a in first + rest] == [(a.kind, a.at) for a in whole]
        assert rest == whole[len(first) :]


# In runs of the real stages.


@pytest.mark.parametrize(
    "loss", [{}, {"kind": "jsd"}, {"features": [{"kind": "hidden_mse"}]}], ids=["kl", "jsd", "features"]
)
def test_small_runs_give_no_warning(runs, loss: dict[str, Any]):
    changes = {"train.epochs": 25, "train.log_every": 1, "train.validate_every": 9}
    folder, answer = runs.trained({**changes, **{f"train.loss.{name}": value for name, value in loss.items()}})
    assert answer["error"] is None
    assert points(folder, "warning") == []
    assert not [post for post in answer["posts"] if "warning" in post]
    for point in points(folder, "train"):
        term = loss.get("kind", "kl")
        assert point[f"{term}_max"] == pytest.approx(point[term], rel=1e-6)
        assert point[f"{term}_max_step"] == point["step"]


def test_a_warning_stands_among_the_points_is_posted_and_is_not_repeated_after_a_stop(tmp_path: Path):
    store, posts = LocalStore(str(tmp_path)), []
    made = spike_at(curve(falling, count=60), 40, 20.0)
    train = [point for point in made if point["group"] == "train"]

    def go_on(from_step: int, to_step: int) -> None:
        curves = WatchedCurves(store, "train", from_step, Watch("kl", "settings"), posts.append)
        for point in train:
            if from_step < point["step"] <= to_step:
                values = {name: point[name] for name in ("kl", "kl_max")}
                curves.add(point["step"], point["step"] / 300, values, notes={"kl_max_step": point["kl_max_step"]})
        curves.close()

    go_on(0, 350)
    go_on(350, 450)
    (post,) = posts
    assert post["step"] == 410
    go_on(430, 600)  # the last checkpoint was that of step 430
    go_on(600, 600)
    assert posts == [post]
    (warning,) = points(tmp_path, "warning")
    assert warning["text"] == post["warning"]
    assert (warning["step"], warning["kind"], warning["term"]) == (410, "spike", "kl")
    assert warning["at"] == train[40]["kl_max_step"]
    assert warning["value"] == train[40]["kl_max"]


def test_a_student_that_learns_labels_away_from_its_teacher_is_told_of(runs):
    # The small run's teacher has a new head and knows nothing: what labels teach is a rise of the distillation loss.
    changes = {"train.epochs": 40, "train.log_every": 1, "train.learning_rate": 0.01, "train.loss.alpha": 0.3}
    folder, answer = runs.trained(changes)
    assert answer["error"] is None
    assert "drift" in {point["kind"] for point in points(folder, "warning")}
    said = [post["warning"] for post in answer["posts"] if "warning" in post]
    assert said == [point["text"] for point in points(folder, "warning")]
    assert all("(train.learning_rate 0.01, precision fp32)" in text for text in said)


def test_the_driver_shows_a_warning_and_agreement_at_each_validation(runs):
    changes = {"train.validate_every": 3}
    folder, answer = runs.trained(changes)
    validations = points(folder, "validation")
    assert [point["step"] for point in validations] == [3, 6, 8]
    assert all(0 <= point["agreement"] <= 1 and point["kl"] >= 0 for point in validations)
    said: list[str] = []
    reader = _Reader(Job(), Progress(said.append))  # type: ignore[arg-type]
    for post in [*answer["posts"], {"step": 8, "warning": "kl jumps"}]:
        reader.show(post)
    lines = [line for line in said if "agreement" in line]
    for point, line in zip(validations, lines, strict=True):
        assert f"step {point['step']}: " in line
        assert f"agreement {point['agreement']:.4f}" in line
    assert said[-1] == "student: warning: kl jumps"


class Job:
    role = title = "student"
