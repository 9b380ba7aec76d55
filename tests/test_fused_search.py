"""A search whose trials are trained together: the same decisions, curves and winner as alone, whatever stops it."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
from test_tune import WHOLE, curves, facts, searched, table

from raydistill.config.file import load_config, validate
from raydistill.config.run import Config
from raydistill.record.run import open_run
from raydistill.stages import pipeline
from raydistill.stages.progress import Progress
from raydistill.stages.search_cost import count_groups, search_cost
from raydistill.stages.status import standings

RATES = [1e-3, 1e-2, 3e-3, 3e-2]
# Rungs at epochs 1 and 2: of four trials two go on, then one.
FUSED = {
    "tune.search": "grid", "tune.space": {"train.learning_rate": {"choice": RATES}}, "tune.data_fraction": 0.5,
    "tune.metric": "nll", "tune.generation": 4, "tune.reduction_factor": 2, "train.epochs": 4, "train.metric": "nll",
}  # fmt: skip
ALONE = FUSED | {"tune.fused": False}
# What may be left over of equal numbers in float32 (tests/test_fused.py), where records have six digits.
CLOSE = {"rel": 1e-4, "abs": 2e-6}


def groups(folder: Path) -> list[list[int]]:
    return [json.loads(path.read_text())["members"] for path in sorted(folder.glob("tune/groups/*/group.json"))]


def same(folder: Path, expected: Path) -> None:
    """The same points, decisions and winner, and the same numbers but for rounding."""
    assert facts(folder)["winner"]["number"] == facts(expected)["winner"]["number"]
    rows = list(zip(table(folder), table(expected), strict=True))
    assert rows
    for row, other in rows:
        assert row == {k: pytest.approx(v, **CLOSE) if isinstance(v, float) else v for k, v in other.items()}
    found, wanted = curves(folder), curves(expected)
    assert {number: len(curve) for number, curve in found.items()} == {n: len(curve) for n, curve in wanted.items()}
    for number, curve in wanted.items():
        for point, other in zip(found[number], curve, strict=True):
            assert point == {k: v if isinstance(v, str) else pytest.approx(v, **CLOSE) for k, v in other.items()}


@pytest.fixture(scope="module")
def fused(runs) -> tuple[Path, dict[str, Any]]:
    folder, answer = searched(runs, FUSED)
    assert answer["error"] is None
    return folder, answer


def test_trials_that_are_trained_together_come_out_as_alone(runs, fused: tuple[Path, dict[str, Any]]):
    alone, answer = searched(runs, ALONE)
    assert answer["error"] is None
    assert groups(fused[0]) == [[0, 1, 2, 3]]
    assert groups(alone) == []
    same(fused[0], alone)
    assert sorted(len(curve) for curve in curves(alone).values()) == [1, 1, 2, 4]


def test_who_is_stopped_is_trained_no_more_and_nothing_is_left_of_the_group(fused: tuple[Path, dict[str, Any]]):
    folder, answer = fused
    epochs = {row["trial"]: row["epochs"] for row in table(folder)}
    posted = [(post["trial"], post["epochs"]) for post in answer["posts"]]
    assert sorted(posted) == sorted((trial, epoch + 1) for trial, count in epochs.items() for epoch in range(count))
    assert {row["trial"]: row["steps"] for row in table(folder)} == {trial: 2 * n for trial, n in epochs.items()}
    assert not list(folder.glob("tune/**/checkpoints"))


@pytest.mark.parametrize("share", [0.15, 0.4, 0.6, 0.75, 0.9, 0.97])
def test_a_killed_fused_search_goes_on_to_the_same(runs, fused: tuple[Path, dict[str, Any]], share: float):
    expected, answer = fused
    folder, killed = searched(runs, FUSED, fault=f"{int(share * len(answer['operations']))}:kill")
    assert killed == {"exit": -9}
    again = runs.run(folder, "tune", changes=FUSED)
    assert again["error"] is None
    assert (table(folder), curves(folder)) == (table(expected), curves(expected))
    assert len(again["posts"]) < len(answer["posts"]) or share < 0.3
    assert not list(folder.glob("tune/**/checkpoints"))


def test_a_generation_is_shared_by_the_processes_there_are(runs, fused: tuple[Path, dict[str, Any]]):
    folder, answer = searched(runs, FUSED | {"cluster.cpus": 2})
    assert answer["error"] is None
    assert groups(folder) == [[0, 1], [2, 3]]
    same(folder, fused[0])


def test_a_search_goes_on_where_more_can_run_at_once(runs):
    tpe = {"tune.search": "tpe", "tune.space": {"train.learning_rate": {"loguniform": [1e-3, 1e-2]}}}
    changes = FUSED | tpe | {"tune.trials": 8, "train.epochs": 2}
    whole, answer = searched(runs, changes)
    assert answer["error"] is None
    assert groups(whole) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    commits = [n for n, name in enumerate(answer["operations"]) if name == "rename group.json"]
    folder, killed = searched(runs, changes, fault=f"{commits[1] - 1}:kill")
    assert killed == {"exit": -9}
    assert runs.run(folder, "tune", changes=changes | {"cluster.cpus": 2})["error"] is None
    assert groups(folder) == [[0, 1, 2, 3], [4, 5], [6, 7]]
    same(folder, whole)


def test_trials_that_share_no_batches_are_in_groups_of_their_own(runs):
    space = {"train.learning_rate": {"choice": [1e-3, 1e-2]}, "train.batch_size": {"choice": [8, 16, 27]},
             "train.seed": {"choice": [0, 1]}}  # fmt: skip
    changes = {**FUSED, "tune.space": space, "tune.generation": 8, "train.epochs": 2}
    folder, answer = searched(runs, changes)
    assert answer["error"] is None
    # The seed changes first, then the rate, then the size: four trials of each size, and generations of eight.
    assert groups(folder) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    alone, answer = searched(runs, changes | {"tune.fused": False})
    assert answer["error"] is None
    same(folder, alone)


def test_tpe_proposes_the_same_points_whether_trials_are_fused_or_not(runs):
    space = {"train.learning_rate": {"loguniform": [1e-3, 1e-2]}, "train.loss.alpha": {"uniform": [0.1, 0.9]}}
    changes = {**FUSED, "tune.search": "tpe", "tune.space": space, "tune.trials": 12, "tune.generation": 6,
               "tune.fused_members": 3, "train.epochs": 2}  # fmt: skip
    folder, answer = searched(runs, changes)
    assert answer["error"] is None
    assert groups(folder) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    alone, _ = searched(runs, {k: v for k, v in changes.items() if k != "tune.fused_members"} | {"tune.fused": False})
    same(folder, alone)


def test_trials_that_are_added_form_groups_of_their_own(runs, fused: tuple[Path, dict[str, Any]]):
    scheduler = {"tune.scheduler": "none", "tune.reduction_factor": 4}
    folder, answer = searched(runs, FUSED | scheduler | {"tune.trials": 2})
    assert answer["error"] is None
    before = curves(folder)
    again = runs.run(folder, "tune", changes=FUSED | scheduler | {"tune.trials": 4})
    assert again["error"] is None
    assert groups(folder) == [[0, 1], [2, 3]]
    assert {post["trial"] for post in again["posts"]} == {2, 3}
    assert {number: curves(folder)[number] for number in before} == before
    alone, _ = searched(runs, WHOLE)
    same(folder, alone)


def test_a_search_that_grows_while_it_is_stopped_keeps_its_groups(runs, fused: tuple[Path, dict[str, Any]]):
    operations = fused[1]["operations"]
    commits = [n for n, o in enumerate(operations, 1) if o.startswith("rename") and "step-" in o]
    folder, killed = searched(runs, FUSED | {"tune.trials": 3}, fault=f"{commits[0] + 2}:kill")
    assert killed == {"exit": -9}
    assert groups(folder) == [[0, 1, 2]]
    again = runs.run(folder, "tune", changes=FUSED)
    assert again["error"] is None
    assert groups(folder) == [[0, 1, 2]]
    assert [row["trial"] for row in table(folder)] == [0, 1, 2, 3]


def test_a_run_searches_trains_the_winner_and_compares(runs, fused: tuple[Path, dict[str, Any]]):
    folder = runs.start("prepare")
    stages = ("prepare", "teach", "tune", "train", "evaluate")
    answer = runs.run(folder, *stages, changes=FUSED)
    assert answer["error"] is None
    assert (table(folder), curves(folder)) == (table(fused[0]), curves(fused[0]))
    config = load_config(folder / "config.yaml")
    run = open_run(config.storage, config.name)
    for part in ("student", "control"):
        plan = run.plan(part)
        assert plan is not None
        assert plan.inputs["train.learning_rate"] == facts(folder)["winner"]["point"]["train.learning_rate"]
    standing = {found.part: found for found in standings(run, config)}
    assert {found.state for found in standing.values()} == {"complete"}
    assert standing["tune"].detail.startswith("4 trials, validation nll ")
    told = "1 fused group of up to 4, or smaller ones where processes would wait"
    line = f"search: 4 trials ({told}), 32 steps at most; no teacher forward"
    assert line in pipeline.plan(config, Progress()).lines()
    # Another search, on request: what stood there is kept, and the student follows it.
    rates = [2e-3, 5e-4, 4e-3, 8e-3]
    again = FUSED | {"tune.space": {"train.learning_rate": {"choice": rates}}}
    refused = runs.run(folder, *stages, changes=again)
    assert "tune.space.train.learning_rate.choice: was made with" in refused["error"]
    redone = runs.run(folder, *stages, changes=again, redo="tune")
    assert redone["error"] is None
    assert "tune.1" in {path.name for path in folder.iterdir()}
    plan = run.plan("student")
    assert plan is not None
    assert plan.inputs["train.learning_rate"] == facts(folder)["winner"]["point"]["train.learning_rate"]
    assert plan.inputs["train.learning_rate"] in rates


def test_a_search_that_ran_out_of_time_goes_on_with_more(runs, fused: tuple[Path, dict[str, Any]]):
    folder, answer = searched(runs, FUSED | {"tune.time_budget": 1e-6})
    assert "tune.time_budget: ended before any trial had an epoch. Raise it" in answer["error"]
    assert runs.run(folder, "tune", changes=FUSED)["error"] is None
    assert (table(folder), curves(folder)) == (table(fused[0]), curves(fused[0]))


def test_a_member_that_fails_is_a_row_and_the_others_go_on(runs):
    # Logits over such a temperature overflow.
    space = {"train.loss.temperature": {"choice": [1e-41, 2.0, 4.0]}}
    folder, answer = searched(runs, FUSED | {"tune.space": space, "tune.scheduler": "none", "tune.reduction_factor": 4})
    assert answer["error"] is None
    rows = table(folder)
    assert [row["status"] for row in rows] == ["failed", "finished", "finished"]
    assert rows[0]["reason"].startswith("the loss at step 1 is not finite. Lower train.learning_rate")
    assert groups(folder) == [[0, 1, 2]]


def test_trials_for_which_there_is_no_room_together_are_trained_alone(runs):
    folder, answer = searched(runs, FUSED, no_room_for_groups=True)
    assert answer["error"] is None
    line = "tune: trials 0, 1, 2, 3 cannot be trained together and are trained alone: MemoryError: no room"
    assert line in answer["said"]
    alone, _ = searched(runs, ALONE)
    assert (table(folder), curves(folder)) == (table(alone), curves(alone))
    # It stays so after a stop.
    stopped, killed = searched(runs, FUSED, no_room_for_groups=True, fault=f"{len(answer['operations']) // 2}:kill")
    assert killed == {"exit": -9}
    again = runs.run(stopped, "tune", changes=FUSED)
    assert again["error"] is None
    assert (table(stopped), curves(stopped)) == (table(alone), curves(alone))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {"train.accumulation": 2},
            "tune.fused: true, and train.accumulation: fused trials take it at its default (1)",
        ),
        (
            {"tune.space": {"train.batch_size": {"choice": [8, 16]}}},
            "tune.fused: true, and no two trials can be trained together: train.batch_size: 16 differs from 8",
        ),
        (
            {"tune.space": {"student.model_type": {"choice": ["bert", "deberta-v2"]}}},
            "tune.space: student.model_type=deberta-v2: tune.fused: true, and student: a model of the type deberta-v2",
        ),
    ],
)
def test_what_cannot_be_fused_is_refused_where_it_is_asked_for(runs, changes: dict[str, Any], part: str):
    folder, answer = searched(runs, FUSED | {"tune.fused": True} | changes)
    assert part in (answer["error"] or "")
    assert not (folder / "tune").exists()


BASE: dict[str, Any] = {
    "name": "run", "data": {"train": "train.csv", "test": "test.csv"}, "teacher": {"model": "teacher"},
    "student": {"init": "config", "hidden_size": 16, "num_layers": 2, "num_heads": 2},
}  # fmt: skip
RATE, SIZE = {"train.learning_rate": {"choice": [1e-3, 1e-2]}}, {"train.batch_size": {"choice": [8, 16]}}
TEMPERATURE = {"train.loss.temperature": {"uniform": [1.0, 4.0]}}


def config(**tune: Any) -> Config:
    return validate({**BASE, "tune": tune}, {}, "test")


@pytest.mark.parametrize(
    ("tune", "expected"),
    [
        ({"space": TEMPERATURE, "trials": 24}, 3),
        ({"space": TEMPERATURE, "trials": 25}, 3),  # the last generation has one trial, which is trained alone
        ({"space": TEMPERATURE, "trials": 26}, 4),
        ({"space": TEMPERATURE, "trials": 24, "fused_members": 3}, 9),  # 3, 3 and 2 of each 8
        ({"space": TEMPERATURE, "trials": 24, "fused": False}, 0),
        ({"space": TEMPERATURE, "trials": 24, "max_concurrent": 2}, 6),  # two of each 8, which is all that tpe knows
        ({"space": TEMPERATURE, "trials": 24, "max_concurrent": 2, "search": "random"}, 3),
        ({"space": TEMPERATURE, "trials": 24, "max_concurrent": 4, "search": "random"}, 6),
        ({"space": TEMPERATURE, "trials": 24, "max_concurrent": 3, "fused_members": 3}, 9),
        ({"space": TEMPERATURE, "trials": 8, "max_concurrent": 3, "search": "random"}, 3),
        ({"space": TEMPERATURE, "trials": 8, "max_concurrent": 7}, 1),  # six are trained alone
        ({"space": TEMPERATURE, "trials": 8, "max_concurrent": 8}, 0),
        ({"space": TEMPERATURE, "trials": 8, "max_concurrent": 8, "fused": True}, 4),
        ({"space": SIZE | RATE, "search": "grid", "max_concurrent": 2}, 2),
        ({"space": SIZE | RATE, "search": "grid", "max_concurrent": 3}, 1),
        ({"space": SIZE, "search": "grid"}, 0),
        ({"space": SIZE | RATE, "search": "grid"}, 2),
        ({"space": SIZE | TEMPERATURE, "trials": 24}, None),
    ],
)
def test_the_groups_that_plan_announces(tune: dict[str, Any], expected: int | None):
    assert count_groups(config(**tune), Path("unused")) == expected


@pytest.mark.parametrize(
    ("tune", "changes", "part"),
    [
        (
            {"space": TEMPERATURE, "trials": 24, "search": "random"}, {},
            "24 trials (3 fused groups of up to 8), 480 steps at most",
        ),
        (
            {"space": TEMPERATURE, "trials": 24}, {},
            "24 trials (3 fused groups of up to 8, or smaller ones where processes would wait), 480 steps at most",
        ),
        ({"space": TEMPERATURE, "trials": 24, "max_concurrent": 2}, {}, "24 trials (6 fused groups of up to 8), 480"),
        ({"space": SIZE | TEMPERATURE, "trials": 24}, {}, "(fused in groups of up to 8 that differ in nothing else"),
        ({"space": SIZE, "search": "grid"}, {}, "(each alone: train.batch_size: 16 differs from 8; fused trials share"),
        ({"space": TEMPERATURE, "trials": 24, "fused": False}, {}, "(each alone: tune.fused: false)"),
        ({"space": TEMPERATURE, "trials": 8, "max_concurrent": 8}, {}, "(each alone: tune.max_concurrent: 8 of them"),
        ({"space": TEMPERATURE, "trials": 24}, {"hidden_size": 1024, "num_heads": 16}, "alone: student: 1024 units"),
    ],
)  # fmt: skip
def test_the_line_of_plan_says_how_trials_are_trained(tune: dict[str, Any], changes: dict[str, Any], part: str):
    # A fifth of 320 rows in batches of 32, 10 epochs.
    found = validate({**BASE, "student": {**BASE["student"], **changes}, "tune": tune}, {}, "test")
    assert part in search_cost(found, 320, Path("unused")).lines()[0]


@pytest.mark.parametrize(
    ("tune", "train", "said"),
    [
        # 64 rows of 320 in batches of 32: 2 steps an epoch, 20 in all, and a tenth of them is warm-up.
        ({"grace_epochs": 1}, {}, "asha first decides after 2 steps of a trial, 2 of them warm-up, when"),
        ({"grace_epochs": 2}, {}, ""),
        ({}, {}, ""),
        ({"grace_epochs": 1}, {"warmup": 0.05}, ""),
        ({"scheduler": "screen", "grace_epochs": 1}, {}, "screen first decides after 2 steps"),
        ({"scheduler": "none"}, {}, ""),
        (
            {"space": {"train.warmup": {"uniform": [0.0, 0.3]}}, "grace_epochs": 1}, {},
            "after 2 steps of a trial, 2 of them warm-up",
        ),
        ({}, {"epochs": 2, "warmup": 0.5}, "after 2 steps of a trial, 2 of them warm-up"),
    ],
)  # fmt: skip
def test_a_search_that_decides_within_the_warm_up_says_so(tune: dict[str, Any], train: dict[str, Any], said: str):
    asked = {"space": TEMPERATURE, "trials": 24, **tune}
    found = validate({**BASE, "train": {**BASE.get("train", {}), **train}, "tune": asked}, {}, "test")
    lines = search_cost(found, 320, Path("unused")).lines()
    assert len(lines) == (2 if said else 1)
    assert said in lines[-1]


def test_what_a_terminal_shows_of_a_search():
    from raydistill.search.trials import Trial
    from raydistill.stages.search_overview import overview

    found = config(space=RATE | TEMPERATURE, trials=30).tune
    assert found is not None

    def trial(number: int, *accuracies: float, **rest: Any) -> Trial:
        curve = tuple({"accuracy": value, "nll": 1.0} for value in accuracies)
        point = {"train.learning_rate": 0.001, "train.loss.temperature": 2.5}
        return Trial(number, point, 4, curve, steps=10 * len(curve), **rest)

    trials = [
        trial(0, 0.5, 0.7, 0.6, status="stopped"), trial(1, 0.9, status="finished"), trial(2, 0.1), trial(3),
        trial(4, status="failed", reason="x"), trial(5, 0.2),
    ]  # fmt: skip
    shown = overview(types.SimpleNamespace(tune=found, trials=trials, live={2, 3}), "best")  # type: ignore[arg-type]
    assert shown.title == "3 of 30 trials ended, 60 steps; trial 1 leads"
    assert shown.columns == ("trial", "learning_rate", "temperature", "epoch", "accuracy", "state")
    assert [(row[0], *row[3:]) for row in shown.rows] == [
        ("2", "1 of 4", "0.1000", "running"), ("3", "0 of 4", "", "running"), ("1", "1 of 4", "0.9000", "finished"),
        ("0", "3 of 4", "0.7000", "stopped"), ("5", "1 of 4", "0.2000", "waiting"), ("4", "0 of 4", "", "failed"),
    ]  # fmt: skip
    assert shown.rows[0][1:3] == ("0.001", "2.5")
