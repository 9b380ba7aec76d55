"""Rows without a label: the teacher scores them and the student learns from them, and nothing else sees them."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_files import column, equal, manifest, points, student_weights
from safetensors.numpy import load_file

from raydistill.losses.objective import Objective
from raydistill.losses.registry import RESPONSE_LOSSES
from raydistill.targets import TeacherTargets

pytestmark = pytest.mark.xdist_group("small_runs")
# Of the small run's 60 rows 55 are train and 5 validation, one of each class; 20 are test.
TRAIN, VALIDATION, TEST, BATCH = 55, 5, 20, 16


@pytest.fixture(scope="module")
def extra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of 21 and 12 texts, one of which stands in the first file too."""
    folder = tmp_path_factory.mktemp("extra")
    for name, numbers in {"a": range(21), "b": [0, *range(21, 32)]}.items():
        lines = [f"more text about parcel number {number} and the money" for number in numbers]
        (folder / f"{name}.csv").write_text("text\n" + "".join(f"{line}\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def changes(extra: Path) -> dict[str, Any]:
    return {"data.unlabelled": [str(extra / "a.csv"), str(extra / "b.csv")]}


@pytest.fixture(scope="module")
def folder(runs: Any, changes: dict[str, Any]) -> Path:
    """A run with 33 rows without a label, up to its report."""
    return runs.finished("prepare", "teach", "train", "evaluate", changes=changes)


def test_they_stand_in_shards_of_their_own_behind_all_others(folder: Path, runs: Any):
    assert manifest(folder, "data").facts["rows"] == {
        "train": TRAIN, "validation": VALIDATION, "test": TEST, "unlabelled": 33,
    }  # fmt: skip
    ids = [i for split in ("train", "validation", "test", "unlabelled") for i in column(folder, split, "row_id")]
    assert ids == list(range(TRAIN + VALIDATION + TEST + 33))
    assert set(column(folder, "unlabelled", "label")) == {-100}
    assert [entry.rows for entry in manifest(folder, "data").shards("unlabelled")] == [16, 16, 1]
    assert column(folder, "unlabelled", "source_file") == [0] * 21 + [1] * 12
    # The other shards hold what they hold without them.
    for split in ("train", "validation", "test"):
        for name in ("row_id", "text", "label"):
            assert column(folder, split, name) == column(runs.whole, split, name)


def test_they_are_counted_and_those_that_stand_twice_are_reported(folder: Path):
    repeated = manifest(folder, "data").facts["repeated"]
    assert repeated["unlabelled_rows_repeating_another"] == 1
    report = json.loads((folder / "report/report.json").read_text())
    assert report["data_report"][0] == "55 train, 5 validation, 20 test, 33 unlabelled rows, 5 labels"
    assert "note: 1 unlabelled rows repeat another one or stand in train" in report["data_report"]
    assert report["teacher_forwards_per_row"] == 1


def test_the_teacher_scores_each_of_them_once_and_never_the_test(folder: Path):
    cache = manifest(folder, "teacher/cache")
    assert sorted(entry.file for entry in cache.files) == sorted(
        entry.file for entry in manifest(folder, "data").shards("train", "validation", "unlabelled")
    )
    assert cache.facts["forwards"] == cache.facts["rows"] == TRAIN + VALIDATION + 33


def test_student_and_control_take_as_many_steps_and_the_control_sees_labelled_rows_alone(folder: Path):
    steps = 2 * math.ceil((TRAIN + 33) / BATCH)
    for part, role in (("student", "train"), ("control/model", "control/train")):
        assert manifest(folder, part).facts["steps"] == steps
        assert [point["step"] for point in points(folder, "validation", role)] == [steps // 2, steps]
        assert points(folder, "train", role)[-1]["epoch"] == 2


def test_a_control_without_unlabelled_rows_is_what_it_always_was(folder: Path, runs: Any, changes: dict[str, Any]):
    # As many epochs of the labelled rows alone as make the same number of steps: 12 of 4 steps each.
    settings = {"train.epochs": 3, "train.schedule": "constant", "train.warmup": 0.0, "train.validate_every": 6}
    other = runs.finished("train", "evaluate", changes=settings, folder=runs.start("train"))
    settings = {**settings, "train.epochs": 2, **changes}
    mixed = runs.finished("prepare", "teach", "train", "evaluate", changes=settings)
    assert manifest(mixed, "control/model").facts["steps"] == manifest(other, "control/model").facts["steps"] == 12
    ours, theirs = (load_file(f / "control/model/model.safetensors") for f in (mixed, other))
    assert equal(ours, theirs)


def test_training_that_was_killed_goes_on_to_the_same_weights(folder: Path, runs: Any, changes: dict[str, Any]):
    killed = runs.start("prepare")
    whole = runs.run(killed, "prepare", "teach", "train", changes=changes)
    assert whole["error"] is None
    assert equal(student_weights(killed), student_weights(folder))
    number = len(whole["operations"]) - whole["operations"][::-1].index("rename step-00000009")
    again = runs.start("prepare")
    answer = runs.run(again, "prepare", "teach", "train", changes=changes, fault=f"{number}:kill")
    assert answer == {"exit": -9}
    answer = runs.run(again, "prepare", "teach", "train", changes=changes)
    assert answer["error"] is None
    assert next(post["going_on_from"] for post in answer["posts"] if "going_on_from" in post) == 6
    assert equal(student_weights(again), student_weights(folder))


def test_prepare_goes_on_after_a_kill_to_the_same_shards(folder: Path, runs: Any, changes: dict[str, Any]):
    operations = runs.run(runs.start("prepare"), "prepare", changes=changes)["operations"]
    killed = runs.start("prepare")
    number = operations.index("rename unlabelled-00001.json") + 1
    assert runs.run(killed, "prepare", changes=changes, fault=f"{number}:kill") == {"exit": -9}
    assert runs.run(killed, "prepare", changes=changes)["error"] is None
    assert manifest(killed, "data").files == manifest(folder, "data").files


def test_the_teacher_s_fine_tuning_does_not_see_them(runs: Any, changes: dict[str, Any]):
    found = {}
    for name, data in {"with": changes, "without": {}}.items():
        made = runs.start("prepare")
        tuning = {"teacher.fine_tune": {"epochs": 1, "batch_size": 16, "precision": "fp32"}}
        assert runs.run(made, "prepare", "teach", changes={**tuning, **data})["error"] is None
        assert manifest(made, "teacher/model").facts["steps"] == math.ceil(TRAIN / 16)
        found[name] = load_file(made / "teacher/model/model.safetensors")
    assert all(np.array_equal(found["with"][name], found["without"][name]) for name in found["with"])


def test_rows_of_train_with_an_empty_label_are_kept_on_request(runs: Any, tmp_path: Path, extra: Path):
    with open(runs.input / "train.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    train = tmp_path / "train.csv"
    with open(train, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "category"])
        writer.writerows([row["text"], "" if number < 5 else row["category"]] for number, row in enumerate(rows))
    asked = {"data.train": str(train), "data.keep_unlabelled": True, "data.unlabelled": str(extra / "b.csv")}
    made = runs.start("prepare")
    assert runs.run(made, "prepare", "teach", "train", changes=asked)["error"] is None
    assert column(made, "unlabelled", "text")[:5] == [row["text"] for row in rows[:5]]
    assert column(made, "unlabelled", "source_file") == [0] * 5 + [1] * 12
    assert manifest(made, "data").facts["files"]["unlabelled"] == [str(train), str(extra / "b.csv")]
    assert manifest(made, "student").facts["steps"] == 2 * math.ceil((TRAIN - 5 + 17) / BATCH)
    dropped = runs.start("prepare")
    answer = runs.run(dropped, "prepare", changes={"data.train": str(train)})
    assert answer["error"] is None
    assert manifest(dropped, "data").facts["dropped"]["train"] == {"null label": 5}


def test_data_with_and_without_them_are_not_taken_for_one_another(folder: Path, runs: Any, extra: Path):
    answer = runs.run(folder, "prepare")
    assert "data: rows.unlabelled: was made with 33, now asked for nothing." in answer["error"]
    answer = runs.run(folder, "prepare", changes={"data.unlabelled": str(extra / "a.csv")})
    assert "data: rows.unlabelled: was made with 33, now asked for 21." in answer["error"]
    # As many other rows.
    answer = runs.run(folder, "prepare", changes={"data.unlabelled": [str(extra / "b.csv"), str(extra / "a.csv")]})
    assert "data: sources_sha256.unlabelled: was made with" in answer["error"]


@pytest.mark.parametrize("hard_targets", ["labels", "teacher"])
@pytest.mark.parametrize("kind", ["forward_kl", "dkd", "logit_mse"])
def test_the_objective_is_the_sum_over_rows_divided_by_all_of_them(kind: str, hard_targets: Any):
    random = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(6, 4, generator=random, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    labels = torch.tensor([1, -100, 3, -100, -100, 0])
    objective = Objective(alpha=0.7, kind=kind, hard_targets=hard_targets)
    loss, parts = objective(student, labels, TeacherTargets(teacher))
    hard = teacher.argmax(dim=1) if hard_targets == "teacher" else labels
    logprobs = torch.log_softmax(student.detach(), dim=1)
    expected = -sum(float(logprobs[n, c]) for n, c in enumerate(hard.tolist()) if c != -100)
    assert float(parts["cross_entropy"]) == pytest.approx(expected, rel=1e-5)
    # Row by row the response loss is what it is with every row alone, labelled by itself or by the teacher.
    alone = sum(
        float(
            RESPONSE_LOSSES[kind](
                teacher[n : n + 1], student[n : n + 1].detach(), hard[n : n + 1], temperature=1.0, parameters={}
            )
        )
        for n in range(6)
    )
    assert loss.item() == pytest.approx(0.7 * alone + 0.3 * expected, rel=1e-5)
    loss.backward()
    assert student.grad is not None
    assert (student.grad.abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"data.unlabelled": "MISSING/x.csv"}, "data.unlabelled: MISSING/x.csv: no such file"),
        ({"data.unlabelled": []}, None),
        ({"data.unlabelled": ["a.csv", ""]}, "data.unlabelled.1: found '' (text)"),
        ({"data.unlabelled": 3}, "data.unlabelled: found 3 (number); it should be a list"),
        (
            {"data.unlabelled": "a.csv", "train.loss.alpha": 0.0},
            "data.unlabelled asks for rows without labels, of which train.loss.alpha: 0 learns nothing; raise alpha",
        ),
        (
            {"data.keep_unlabelled": True, "train.loss.alpha": 0.0},
            "data.keep_unlabelled asks for rows without labels, of which train.loss.alpha: 0 learns nothing",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    runs: Any, tmp_path: Path, asked: dict[str, Any], message: str | None
):
    asked = json.loads(json.dumps(asked).replace("MISSING", str(tmp_path)))
    made = runs.start("prepare")
    answer = runs.run(made, "prepare", changes=asked)
    if message is None:
        assert answer["error"] is None
        return
    assert message.replace("MISSING", str(tmp_path)) in answer["error"]
    assert len(answer["error"].splitlines()) == 1
    assert not list(made.glob("data/*"))


def test_a_plan_counts_them(runs: Any, changes: dict[str, Any]):
    from raydistill.config.file import validate
    from raydistill.stages import pipeline
    from raydistill.stages.progress import Progress

    settings = {
        "name": "plan", "storage": str(runs.folder / "plans"),
        "data": {
            "train": str(runs.input / "train.csv"), "test": str(runs.input / "test.csv"), "label": "category",
            "max_length": 48, "unlabelled": changes["data.unlabelled"],
        },
        "teacher": {"model": str(runs.input / "teacher"), "fine_tune": {"epochs": 1, "batch_size": 16}},
        "train": {"epochs": 2, "batch_size": 16},
    }  # fmt: skip
    cost = pipeline.plan(validate(settings, {}, "test"), Progress())
    assert cost.rows == {"train": TRAIN, "validation": VALIDATION, "test": TEST, "unlabelled": 33}
    assert cost.teacher_forwards == TRAIN + VALIDATION + 33
    assert cost.steps == {"teacher": 4, "student": 12, "control": 12}
