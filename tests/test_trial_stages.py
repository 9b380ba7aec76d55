"""A search over stages of a training: what a space may say of them, and trials that go through them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_tune import facts, searched, table

from raydistill.config.file import load_config, validate
from raydistill.config.points import with_first_rung, with_point
from raydistill.config.run import Config
from raydistill.search.rungs import decide
from raydistill.search.trials import Trial
from raydistill.stages.training_stages import training_stages

pytestmark = [pytest.mark.xdist_group("small_runs"), pytest.mark.timeout(1800)]

STAGES = [{"name": "soft", "epochs": 1}, {"name": "more", "epochs": 2, "batch_size": 8, "loss": {"alpha": 0.5}}]
RATES = [1e-3, 3e-2]
# Rungs at epochs 1 and 2: after the first stage, and within the second.
SEARCH = {
    "train.stages": STAGES, "tune.search": "grid", "tune.scheduler": "none", "tune.metric": "nll",
    "train.metric": "nll", "tune.space": {"train.stages.1.learning_rate": {"choice": RATES}},
}  # fmt: skip


def stage_curves(folder: Path) -> dict[int, list[list[dict[str, float]]]]:
    """The validations of every trial, by its number and stage, from what its trainings wrote."""
    found: dict[int, list[list[dict[str, float]]]] = {}
    for path in sorted(folder.glob("tune/trials/*/stages/*/metrics.jsonl")):
        points = [json.loads(line) for line in path.read_text().splitlines()]
        found.setdefault(int(path.parents[2].name[:4]), []).append([p for p in points if p["group"] == "validation"])
    return found


@pytest.fixture(scope="module")
def whole(runs) -> tuple[Path, dict[str, Any]]:
    folder, answer = searched(runs, SEARCH | {"tune.data_fraction": 1})
    assert answer["error"] is None, answer["error"]
    return folder, answer


def test_a_trial_goes_through_its_stages_as_the_training_does(runs, whole: tuple[Path, dict[str, Any]]):
    folder, _ = whole
    stages = [STAGES[0], STAGES[1] | {"learning_rate": RATES[1]}]
    trained, answer = runs.trained({"train.stages": stages, "train.metric": "nll"})
    assert answer["error"] is None
    expected = []
    for path in sorted(trained.glob("train/stages/*/metrics.jsonl")):
        points = [json.loads(line) for line in path.read_text().splitlines()]
        expected.append([point for point in points if point["group"] == "validation"])
    assert [len(curve) for curve in expected] == [1, 2]
    assert stage_curves(folder)[1] == expected
    assert {row["steps"] for row in table(folder)} == {4 + 2 * 7}  # of 54 rows: batches of 16, then of 8
    assert {row["epochs"] for row in table(folder)} == {3}


def test_the_winner_is_one_of_a_last_stage(whole: tuple[Path, dict[str, Any]]):
    folder, _ = whole
    last = {number: curves[1] for number, curves in stage_curves(folder).items()}
    best = {number: min(point["nll"] for point in curve) for number, curve in last.items()}
    number = min(best, key=lambda n: best[n])
    won = facts(folder)["winner"]
    assert (won["number"], won["value"]) == (number, pytest.approx(best[number], rel=1e-5))
    assert won["epoch"] in (2, 3)
    config = load_config(folder / "tune/best.yaml")
    assert config.train.stages is not None
    assert config.train.stages[1].learning_rate == RATES[number]


def test_ended_trials_leave_no_models_and_no_checkpoints(whole: tuple[Path, dict[str, Any]]):
    left = {path.name for path in whole[0].glob("tune/trials/*/stages/*/*")}
    assert left == {"metrics.jsonl", "tensorboard"}


# The first stage's model, and either checkpoint of the second stage, of the first trial.
@pytest.mark.parametrize("operation", ["rename model", "rename step-00000007", "rename step-00000014"])
def test_a_killed_search_goes_on_to_the_same(runs, whole: tuple[Path, dict[str, Any]], operation: str):
    expected, answer = whole
    number = answer["operations"].index(operation) + 1
    folder, killed = searched(runs, SEARCH | {"tune.data_fraction": 1}, fault=f"{number}:kill")
    assert killed == {"exit": -9}
    again = runs.run(folder, "tune", changes=SEARCH | {"tune.data_fraction": 1})
    assert again["error"] is None
    assert table(folder) == table(expected)
    assert stage_curves(folder) == stage_curves(expected)


def test_whole_lists_of_stages_are_tried_beside_none(runs):
    space = {"train.stages": {"choice": [None, STAGES]}}
    changes = SEARCH | {"tune.space": space, "tune.scheduler": "asha", "tune.reduction_factor": 2, "tune.generation": 2}
    folder, answer = searched(runs, {k: v for k, v in changes.items() if k != "train.stages"})
    assert answer["error"] is None
    assert [row["status"] for row in table(folder)].count("finished") == 1
    assert any(row["reason"].startswith("rung of epoch 1: place 2 of 2") for row in table(folder))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"train.stages": [STAGES[0], {"name": "self", "teacher": "previous"}]},
         "train.stages[1].teacher: previous, and a student of every trial would score all rows"),
        ({"train.stages": [STAGES[0], {**STAGES[1], "choose": "last"}]},
         "train.stages[1].choose: found last, and a search chooses by train.choose, which is best"),
        ({"train.stages": [STAGES[0], {**STAGES[1], "loss": {"features": [{"kind": "hidden_mse"}]}}]},
         "train.stages[1].loss.features: the teacher would run in every trial. Set train.stages[1].loss.features_from"),
        ({"tune.fused": True}, "train.stages: fused trials take it at its default (absent) alone"),
        ({"tune.space": {"train.stages.2.learning_rate": {"choice": RATES}}},
         "train.stages.2.learning_rate: there is no 2 among 2, counted from 0"),
        ({"tune.space": {"train.stages.1.loss.temperature": {"choice": [1.0, 0.0]}}},
         "tune.space.train.stages.1.loss.temperature: found 0"),
        ({"tune.space": {"train.stages.1.rate": {"choice": RATES}}}, "train.stages.1.rate: "),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(runs, changes: dict[str, Any], part: str):
    folder, answer = searched(runs, SEARCH | changes)
    assert part in (answer["error"] or "")
    assert not (folder / "tune").exists()


def config(**train: Any) -> Config:
    data = {"train": "a.csv", "test": "b.csv", "text": "text", "label": "label"}
    tune = {"space": {"train.stages.0.loss.temperature": {"choice": [2.0, 4.0]}}, "search": "grid"}
    settings = {"name": "run", "data": data, "teacher": {"model": "t"}, "tune": tune}
    return validate({**settings, "train": {"stages": STAGES, **train}}, {}, "a test")


def test_a_point_changes_one_stage_and_no_other():
    made = with_point(config(), {"train.stages.0.loss.temperature": 4.0})
    first, second = training_stages("student", made)
    assert first.settings.loss.temperature == 4.0
    assert second.settings.loss == config().train.of_stage(1).loss


def test_the_first_rung_follows_the_warm_up_of_the_first_stage():
    def rung(epochs: int, warmup: float) -> int | None:
        stages = [{"name": "a", "epochs": epochs}, {"name": "b", "epochs": 4}]
        found = with_first_rung(config(stages=stages, warmup=warmup)).tune
        assert found is not None
        return found.grace_epochs

    assert rung(4, 0.5) == 4
    assert rung(2, 0.5) == 2
    assert rung(1, 0.1) == 1


def test_a_trial_stands_for_its_last_stage_and_has_patience_with_each():
    curve = tuple({"accuracy": value, "nll": 1.0} for value in (0.9, 0.8, 0.7, 0.5, 0.6))
    trial = Trial(0, {}, 6, curve, epochs_before=3)
    assert trial.chosen_epoch("accuracy", "best") == 5
    assert trial.chosen_epoch("accuracy", "last") == 5
    assert Trial(0, {}, 6, curve[:2], epochs_before=3).chosen_epoch("accuracy", "best") == 1
    tune = config().tune
    assert tune is not None
    patient = tune.model_copy(update={"patience": 2, "scheduler": "none"})
    assert decide(patient, [trial], 0).what == "go"
    assert decide(patient, [Trial(0, {}, 6, curve)], 0).what == "stop"
