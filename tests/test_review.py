"""Review of the teacher by a person, rows that are excluded from its losses, and the model card.

Shapes: N rows, K classes, L tokens, W width.
"""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from run_files import column, equal, facts, manifest, points, student_weights
from small_runs import SmallRuns

from raydistill import cli
from raydistill.cache.shards import read_logits
from raydistill.data.exclusion import Exclusion
from raydistill.losses.feature_objective import FeatureTerm
from raydistill.losses.objective import Objective
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run, verify
from raydistill.record.store import LocalStore
from raydistill.report.review import wilson
from raydistill.targets import TeacherTargets
from raydistill.tickets import CATEGORIES

pytestmark = pytest.mark.xdist_group("small_runs")
LABELS = sorted(CATEGORIES)


# The loss.


def rows(count: int = 7, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student and teacher logits, labels (one row has none), and which rows are excluded."""
    random = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(count, classes, generator=random) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3, -100, 1, 0][:count])
    excluded = torch.tensor([False, True, False, True, True, False, False][:count])
    return student.requires_grad_(), teacher, labels, excluded


def by_hand(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, excluded: torch.Tensor) -> float:
    """alpha 0.7 at temperature 2 for rows that are not excluded, cross-entropy alone for the others; row by row."""
    total = 0.0
    for s, t, label, out in zip(student.double(), teacher.double(), labels.tolist(), excluded.tolist(), strict=True):
        hard = 0.0 if label < 0 else -float(torch.log_softmax(s, 0)[label])
        if out:
            total += hard
            continue
        p, q = torch.softmax(t / 2, 0), torch.softmax(s / 2, 0)
        total += 0.7 * 4 * float((p * (p / q).log()).sum()) + 0.3 * hard
    return total


def test_excluded_rows_learn_from_their_labels_alone():
    student, teacher, labels, excluded = rows()
    objective = Objective(temperature=2.0, alpha=0.7, excludes=True)
    loss, parts = objective(student, labels, TeacherTargets(teacher, excluded_N=excluded))
    assert loss.item() == pytest.approx(by_hand(student.detach(), teacher, labels, excluded), rel=1e-5)
    assert tuple(parts) == objective.part_names == ("cross_entropy", "kl", "excluded_cross_entropy")
    (gradient,) = torch.autograd.grad(loss, student)
    (alone,) = torch.autograd.grad(F.cross_entropy(student[excluded], labels[excluded], reduction="sum"), student)
    assert torch.allclose(gradient[excluded], alone[excluded], atol=1e-6)
    other = TeacherTargets(teacher + 5 * excluded[:, None] * torch.randn(7, 4), excluded_N=excluded)
    assert objective(student, labels, other)[0].item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["forward_kl", "dist", "dkd"])
def test_none_and_all_excluded(kind: str):
    student, teacher, labels, excluded = rows()
    none, everything = torch.zeros_like(excluded), torch.ones_like(excluded)
    objective = Objective(alpha=0.7, kind=kind, excludes=True)
    plain = Objective(alpha=0.7, kind=kind)(student, labels, TeacherTargets(teacher))[0]
    found = objective(student, labels, TeacherTargets(teacher, excluded_N=none))[0]
    assert found.item() == pytest.approx(plain.item(), rel=1e-6)
    loss, parts = objective(student, labels, TeacherTargets(teacher, excluded_N=everything))
    assert loss.item() == pytest.approx(F.cross_entropy(student, labels, reduction="sum").item(), rel=1e-6)
    assert all(torch.isfinite(part) for part in parts.values())
    assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()


@pytest.mark.parametrize("kind", ["hidden_mse", "rkd_distance"])
def test_features_of_excluded_rows_teach_nothing(kind: str):
    student, teacher, labels, excluded = rows()
    shape = (7, 6) if kind.startswith("rkd") else (7, 5, 6)
    random = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(shape, generator=random, requires_grad=True), torch.randn(shape, generator=random)
    mask = torch.ones(7, 5, dtype=torch.long)
    objective = Objective(alpha=0.5, features=(FeatureTerm(kind, 2.0, ((0, 0),)),), excludes=True)

    def loss_of(features: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        targets = TeacherTargets(teacher, ((features,),), out)
        return objective(student, labels, targets, student_features=((ours,),), mask_NL=mask)[0]

    changed = theirs + excluded.view(-1, *[1] * (len(shape) - 1))
    assert loss_of(changed, excluded).item() == loss_of(theirs, excluded).item()
    (gradient,) = torch.autograd.grad(loss_of(theirs, excluded), ours)
    assert (gradient[excluded] == 0).all()
    assert (gradient[~excluded] != 0).any()
    whole = loss_of(theirs, torch.ones_like(excluded))
    assert torch.isfinite(torch.autograd.grad(whole, ours)[0]).all()


def test_hard_targets_of_the_teacher_are_not_for_excluded_rows():
    student, teacher, labels, excluded = rows()
    objective = Objective(alpha=0.0, hard_targets="teacher", excludes=True)
    loss, _ = objective(student, labels, TeacherTargets(teacher, excluded_N=excluded))
    expected = torch.where(excluded, labels, teacher.argmax(1))
    assert loss.item() == pytest.approx(F.cross_entropy(student, expected, reduction="sum").item(), rel=1e-6)


# The rule.


def test_each_part_of_the_rule():
    logits = np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.9, 0.05, 0.05]], np.float32))
    labels, ids = np.array([0, 0, -100, 1]), np.array([3, 4, 5, 6])
    found = {
        "confidence_below": Exclusion(confidence_below=0.7), "wrong": Exclusion(wrong=True),
        "classes": Exclusion(classes=(1,)), "marked_bad": Exclusion(row_ids=frozenset({3, 6})),
    }  # fmt: skip
    expected = {
        "confidence_below": [1, 0, 1, 0], "wrong": [0, 1, 0, 1], "classes": [0, 1, 0, 1], "marked_bad": [1, 0, 0, 1],
    }  # fmt: skip
    for name, rule in found.items():
        assert rule.excluded(ids, labels, logits).astype(int).tolist() == expected[name], name
    both = Exclusion(confidence_below=0.7, wrong=True)
    assert both.count([(ids, labels, logits)]) == {"rows": 4, "confidence_below": 2, "wrong": 2}


def test_the_rule_for_sets_of_labels():
    logits = np.array([[2.0, -2.0], [2.0, 0.1], [-3.0, -3.0]], np.float32)
    labels, ids = np.array([[1, 0], [1, 0], [-100, -100]], np.int8), np.arange(3)
    assert Exclusion(wrong=True).excluded(ids, labels, logits).tolist() == [False, True, False]
    shares = 1 / (1 + np.exp(-np.abs(logits.astype(np.float64))))
    assert shares.prod(axis=1).tolist() == pytest.approx([0.776, 0.462, 0.907], abs=1e-3)
    assert Exclusion(confidence_below=0.5).excluded(ids, labels, logits).tolist() == [False, True, False]
    assert Exclusion(classes=(1,)).excluded(ids, labels, logits).tolist() == [False, True, False]


# Runs.


def cached_logits(folder: Path) -> np.ndarray:
    store, cache = LocalStore(str(folder)), manifest(folder, "teacher/cache")
    shards = [read_logits(store, "teacher/cache", entry, cache) for entry in cache.shards("train")]
    return np.concatenate([shard.logits_NK for shard in shards])


def test_a_training_without_excluded_rows_says_how_many(runs: SmallRuns):
    wrong = cached_logits(runs.whole).argmax(1) != np.array(column(runs.whole, "train", "label"))
    assert 0 < wrong.sum() < len(wrong)  # of an untrained teacher
    changes = {"train.exclude": {"wrong": True}, "train.log_every": 1}
    folder, answer = runs.trained(changes)
    assert answer["error"] is None, answer["error"]
    expected = {"of": len(wrong), "rows": int(wrong.sum()), "wrong": int(wrong.sum())}
    assert facts(folder)["excluded"] == expected
    line = f"{expected['rows']} of {expected['of']} rows (wrong {expected['rows']})"
    assert f"train: excluded from the teacher's losses: {line}" in answer["said"]
    for point in points(folder, "train"):
        parts = 0.9 * point["kl"] + 0.1 * point["cross_entropy"] + point["excluded_cross_entropy"]
        assert point["loss"] == pytest.approx(parts, rel=1e-5)
    assert not equal(student_weights(folder), student_weights(runs.whole))
    plan = Plan.unsealed((folder / "train/plan.json").read_bytes(), "plan")
    assert plan.inputs["train.exclude"]["wrong"] is True
    before = Plan.unsealed((runs.whole / "train/plan.json").read_bytes(), "plan")
    assert not any(name.startswith("train.exclude") for name in before.inputs)
    again = runs.run(folder, "train", changes={**changes, "train.exclude": {"confidence_below": 0.5}})
    assert "train.exclude.confidence_below: was made with nothing, now asked for 0.5" in again["error"]


def test_a_training_that_was_killed_goes_on_to_the_same_bytes(runs: SmallRuns):
    whole, killed = runs.killed_training({"train.exclude": {"wrong": True}})
    assert equal(student_weights(whole), student_weights(killed))


def reviewed_run(runs: SmallRuns) -> Path:
    """A new run's folder with data, cache, student and config."""
    folder = runs.start("train")
    for part in ("train", "student"):
        shutil.copytree(runs.whole / part, folder / part)
    settings = yaml.safe_load((runs.whole / "config.yaml").read_text())
    settings |= {"name": folder.name, "storage": str(folder.parent)}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "review/review.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_table(folder: Path, lines: list[dict[str, str]], delimiter: str = ",") -> None:
    with open(folder / "review/review.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, lines[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(lines)


@pytest.fixture(scope="module")
def drawn(runs: SmallRuns) -> Path:
    folder = reviewed_run(runs)
    assert cli._main(["review", str(folder), "--rows", "20"]) == 0
    return folder


def test_the_sample_is_of_train_and_of_each_kind(drawn: Path):
    lines, logits = table(drawn), cached_logits(drawn).astype(np.float64)
    ids, texts = column(drawn, "train", "row_id"), column(drawn, "train", "text")
    labels = np.array(column(drawn, "train", "label"))
    assert len(lines) == len({line["row_id"] for line in lines}) == 20
    assert {line["stratum"] for line in lines} <= {"random", "unsure", "label", "student"}
    assert sum(line["stratum"] == "random" for line in lines) == 5
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares = (shares / shares.sum(1, keepdims=True)).max(1)
    for line in lines:
        place = ids.index(int(line["row_id"]))  # a row of train, so none of test
        assert (line["text"], line["label"]) == (texts[place], LABELS[labels[place]])
        assert line["teacher"] == LABELS[logits[place].argmax()]
        assert float(line["teacher_probability"]) == pytest.approx(shares[place], abs=1e-4)
        assert (line["mark"], line["note"]) == ("", "")
        assert line["stratum"] != "label" or logits[place].argmax() != labels[place]
        assert line["stratum"] != "student" or line["student"] != line["teacher"]
    random = {int(line["row_id"]) for line in lines if line["stratum"] == "random"}
    least = [ids[place] for place in np.argsort(shares, kind="stable") if ids[place] not in random]
    unsure = {int(line["row_id"]) for line in lines if line["stratum"] == "unsure"}
    assert set(least[:5]) <= unsure


def test_the_seed_draws_the_sample(runs: SmallRuns, drawn: Path):
    folder = reviewed_run(runs)
    for arguments, same in ((["--seed", "0"], True), (["--seed", "1", "--again"], False)):
        assert cli._main(["review", str(folder), "--rows", "20", *arguments]) == 0
        assert (table(folder) == table(drawn)) is same
    assert (folder / "review.1/review.csv").exists()  # what stood there is kept


def marked(folder: Path, delimiter: str = ",") -> list[dict[str, str]]:
    """The table with every second row marked."""
    lines = table(folder)
    for number, line in enumerate(lines):
        line["mark"] = ("good", "", "Bad", "", "unclear", "")[number % 6]
        line["note"] = "a, b; c" if number == 2 else ""
    write_table(folder, lines, delimiter)
    return lines


def test_marks_are_read_reported_and_exclude_rows(runs: SmallRuns, capsys: pytest.CaptureFixture[str]):
    folder = reviewed_run(runs)
    assert cli._main(["review", str(folder), "--rows", "20"]) == 0
    lines = marked(folder, delimiter=";")
    capsys.readouterr()
    assert cli._main(["review", str(folder)]) == 0
    said = capsys.readouterr().out
    bad = [int(line["row_id"]) for line in lines if line["mark"] == "Bad"]
    assert len(bad) == 3
    assert "7 of 20 rows are judged, 3 of them bad." in said
    page = (folder / "review/review.html").read_text()
    assert page.count('value="bad" checked') == 3
    assert 'value="a, b; c"' in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    changes = {"train.exclude": {"marked_bad": True}, "teacher.cache_from": str(folder)}
    other = folder.parent / f"{folder.name}-again"
    other.mkdir()
    answer = runs.run(other, "train", changes=changes)
    assert answer["error"] is None, answer["error"]
    assert facts(other)["excluded"] == {"of": 55, "rows": 3, "marked_bad": 3}
    lines[2]["mark"] = "good"
    write_table(folder, lines)
    assert "train.exclude.marked: was made with" in runs.run(other, "train", changes=changes)["error"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mark": "wrong"}, "line 2: mark: found 'wrong'; it is one of good, bad, unclear, or empty"),
        ({"row_id": "99999"}, "line 2: row_id '99999' is none of the sample. Keep the row_ids that review wrote"),
        ({"row_id": ""}, "line 2: row_id '' is none of the sample"),
    ],
)
def test_a_table_that_cannot_be_read(
    drawn: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str], message: str
):
    lines = table(drawn)
    write_table(drawn, [{**lines[0], **change}, *lines[1:]])
    assert cli._main(["review", str(drawn)]) == 2
    assert message in capsys.readouterr().err
    write_table(drawn, [lines[0], lines[0]])
    assert cli._main(["review", str(drawn)]) == 2
    assert f"row_id {lines[0]['row_id']} stands twice. Remove one of the lines" in capsys.readouterr().err
    write_table(drawn, [{"row_id": "1", "mark": "good"}])
    assert cli._main(["review", str(drawn)]) == 2
    assert "has no column 'note'. Keep the columns that review wrote" in capsys.readouterr().err
    write_table(drawn, lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.exclude": {}}, "names no rows. Set confidence_below, wrong, classes or marked_bad"),
        ({"train.exclude": {"classes": ["moon"]}}, "train.exclude.classes: 'moon' is not one of the data's labels"),
        ({"train.exclude": {"marked_bad": True}}, "review: is not there. Run `raydistill review` with the run"),
        ({"train.exclude": {"classes": LABELS}}, "train.exclude: excludes all 55 rows"),
        ({"train.exclude": {"wrong": True}, "train.loss.alpha": 0}, "exclude: nothing is learned from the teacher"),
        (
            {"train.exclude": {"wrong": True}, "train.stages": [{"name": "a"}, {"name": "b", "teacher": "previous"}]},
            "teacher: previous, and train.exclude is about what the first teacher says",
        ),
    ],
)
def test_rules_that_are_refused(runs: SmallRuns, changes: dict[str, Any], message: str):
    folder, answer = runs.trained(changes)
    assert message in answer["error"]
    assert not (folder / "train").exists()


def test_the_interval_of_a_share():
    """The ends are the shares p whose own normal interval ends at the share that was found: roots of a quadratic."""
    for hits, trials in ((0, 9), (3, 20), (7, 7), (50, 100)):
        share, z = hits / trials, 1.959963984540054
        roots = np.roots([1 + z**2 / trials, -(2 * share + z**2 / trials), share**2]).real
        assert wilson(hits, trials) == pytest.approx((max(0, roots.min()), min(1, roots.max())), abs=1e-9)


# The model card, and the review in the report.


@pytest.fixture(scope="module")
def evaluated(runs: SmallRuns) -> Path:
    folder = reviewed_run(runs)
    assert cli._main(["review", str(folder), "--rows", "20"]) == 0
    answer = runs.run(folder, "evaluate", changes=EVALUATE)
    assert answer["error"] is None, answer["error"]
    return folder


EVALUATE = {
    "evaluate.control": False, "evaluate.latency_requests": 16, "evaluate.bootstrap": 100,
    "evaluate.card": {"license": "apache-2.0", "language": ["en"]},
}  # fmt: skip


def test_the_card_is_the_hubs_and_leaves_the_student_as_it_was(runs: SmallRuns, evaluated: Path):
    card = (evaluated / "student/README.md").read_text()
    assert card == (evaluated / "report/model_card.md").read_text()
    _, front, body = card.split("---\n", 2)
    facts_of, report = yaml.safe_load(front), json.loads((evaluated / "report/report.json").read_text())
    assert facts_of["license"] == "apache-2.0"
    assert facts_of["language"] == ["en"]
    assert (facts_of["library_name"], facts_of["pipeline_tag"]) == ("transformers", "text-classification")
    assert "base_model" not in facts_of  # the teacher is a folder, whose path says nothing elsewhere
    results = facts_of["model-index"][0]["results"][0]
    assert {one["type"]: one["value"] for one in results["metrics"]} == {
        "accuracy": round(report["student"]["accuracy"], 4), "f1": round(report["student"]["macro_f1"], 4),
    }  # fmt: skip
    assert str(runs.input) not in card
    assert f"{report['student']['parameters']:,} parameters" in body
    before, after = manifest(runs.whole, "student"), manifest(evaluated, "student")
    assert before == after
    assert verify(Run(LocalStore(str(evaluated))))[1] == []
    (evaluated / "student/README.md").unlink()
    assert "evaluate: complete" in runs.run(evaluated, "evaluate", changes=EVALUATE)["said"]
    assert (evaluated / "student/README.md").read_text() == card


def test_the_card_loads_by_the_hubs_own_client(evaluated: Path):
    from huggingface_hub import ModelCard

    card = ModelCard.load(evaluated / "student/README.md")
    assert card.data.eval_results is not None
    assert card.data.eval_results[0].metric_type == "accuracy"
    assert card.data.license == "apache-2.0"


def test_marks_come_into_the_report(runs: SmallRuns, evaluated: Path):
    before = json.loads((evaluated / "report/report.json").read_text())
    assert before["review"] is None
    marked(evaluated)
    assert cli._main(["review", str(evaluated)]) == 0
    after = json.loads((evaluated / "report/report.json").read_text())
    assert after["review"]["judged"] == 7
    assert {k: v for k, v in after.items() if k != "review"} == {k: v for k, v in before.items() if k != "review"}
    assert "What a person says of the teacher" in (evaluated / "report/report.html").read_text()
    assert verify(Run(LocalStore(str(evaluated))))[1] == []
    assert "evaluate: complete" in runs.run(evaluated, "evaluate", changes=EVALUATE)["said"]


def test_a_review_of_texts_is_refused(language_runs: SmallRuns, capsys: pytest.CaptureFixture[str]):
    assert cli._main(["review", str(language_runs.whole)]) == 2
    assert "review: is of answers that are classes, and this run's are texts" in capsys.readouterr().err
