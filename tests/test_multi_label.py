"""Rows with several labels or none: reading, drawing, measuring, and a whole run of them.

Shapes: N rows, K classes.
"""

import csv
import json
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_files import equal, manifest, points, student_weights
from sklearn.metrics import f1_score, log_loss

from raydistill.cache.shards import read_logits
from raydistill.data.labels import LabelNumbers, read_label
from raydistill.data.shards import ShardWriter, read_shard, read_split
from raydistill.data.sources import Columns, Row, find_source, read_rows
from raydistill.data.splits import ValidationDraw, share_of_sets, survey
from raydistill.losses.calibration import fit_binary_temperature
from raydistill.record.store import LocalStore
from raydistill.report.label_sets import compare_label_sets, label_set_metrics, mean_binary_kl
from raydistill.tickets import CATEGORIES

pytestmark = pytest.mark.xdist_group("small_runs")
LABELS = sorted(CATEGORIES)
COLUMNS = Columns("text", "label", ",", 1000, separator="|")


# Reading.


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("a", ("a",)), ("b|a", ("a", "b")), (" b | a ", ("a", "b")), ("a|a", ("a",)), ("a|", ("a",)), ("", ()),
        ("|", ()), ([], ()), (["b", "a"], ("a", "b")), (["a|b"], ("a|b",)), ([2, "a"], ("2", "a")), (7, ("7",)),
        (None, None),
    ],
)  # fmt: skip
def test_a_set_of_names(value: object, label: object):
    assert read_label(value, "|") == label


@pytest.mark.parametrize("value", [1.5, True, [True], [None], [["a"]], {"a": 1}, "a\nb|c", ["x" * 257]])
def test_what_is_no_set_of_names(value: object):
    with pytest.raises(ValueError, match="is not a name"):
        read_label(value, "|")


def test_sets_in_every_format(tmp_path: Path):
    expected = [("a", ("x", "y")), ("b", ()), ("c", ("y",))]
    (tmp_path / "a.csv").write_text("text,label\na,y|x\nb,\nc,y\n")
    lines = [{"text": "a", "label": ["y", "x"]}, {"text": "b", "label": []}, {"text": "c", "label": "y"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table = pa.table({"text": ["a", "b", "c"], "label": [["x", "y"], [], ["y"]]})
    pq.write_table(table, tmp_path / "a.parquet")
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        rows = read_rows(find_source("data.train", str(tmp_path / name)), COLUMNS)
        assert [(row.text, row.label) for row in rows if isinstance(row, Row)] == expected
    # Only what says nothing is a row without a label.
    (tmp_path / "b.jsonl").write_text('{"text": "a", "label": null}\n{"text": "b", "label": ["x"]}\n')
    found = survey(find_source("data.train", str(tmp_path / "b.jsonl")), COLUMNS, max_dropped=0.5)
    assert (found.labels, found.dropped) == ({("x",): 1}, {"null label": 1})


def test_a_shard_holds_a_byte_for_each_class(tmp_path: Path):
    numbers = LabelNumbers(["a", "b", "c"], sets=True)
    store = LocalStore(str(tmp_path))
    writer = ShardWriter(store, "train", first_row_id=5, shard_rows=3, fingerprint="f", classes=numbers.classes)
    for number, label in enumerate([("a", "c"), (), None, ("b",)]):
        made = numbers.of(label)
        assert isinstance(made, bytes)
        writer.add(Row(f"text {number}", label, 0, number), made)
    shards = list(read_split(store, writer.close()))
    assert [shard.labels_N.tolist() for shard in shards] == [[[1, 0, 1], [0, 0, 0], [-100] * 3], [[0, 1, 0]]]
    assert shards[0].labels_N.dtype == np.int8
    assert numbers.of(("a", "unknown")) is None


# Drawing validation rows.

SETS = st.lists(
    st.frozensets(st.sampled_from("abcdef"), max_size=4).map(lambda s: tuple(sorted(s))), min_size=1, max_size=150
)


@given(SETS, st.floats(0.01, 0.49), st.integers(0, 1000))
def test_every_label_has_its_share_in_validation_and_every_set_its_share_rounded(rows: Any, share: float, seed: int):
    counts = Counter(rows)
    drawn = share_of_sets(counts, share, seed)
    assert drawn == share_of_sets(counts, share, seed)
    for label, count in counts.items():
        assert math.floor(count * share) <= drawn[label] <= math.ceil(count * share)
    for name in "abcdef":
        total = sum(count for label, count in counts.items() if name in label)
        assert sum(n for label, n in drawn.items() if name in label) >= int(total * share + 0.5)
    assert drawn.get((), 0) == int(counts[()] * share + 0.5)
    draw = ValidationDraw(counts, share, seed)
    taken = Counter(row for row in rows if draw.takes(row))
    assert taken == +Counter(drawn)


def test_sets_of_one_label_are_drawn_as_labels_are():
    counts = Counter({"a": 25, "b": 7, "c": 4, "d": 100})
    sets = Counter({(label,): count for label, count in counts.items()})
    assert ValidationDraw(sets, 0.1, 0).rows == {(n,): c for n, c in ValidationDraw(counts, 0.1, 0).rows.items()}


def test_a_rare_label_that_every_set_has_once_is_still_drawn():
    # Ten sets of one row each: every one alone rounds to none, and a plain draw by set would leave all labels out.
    sets = Counter({tuple(sorted(("rare", f"other {n}"))): 1 for n in range(10)})
    assert sum(share_of_sets(sets, 0.2, 0).values()) == 2


# Measuring.


def logits_and_labels(rows: int = 40, classes: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = (random.random((rows, classes)) < [0.5, 0.2, 0.05, 0.0]).astype(np.int8)
    teacher = (random.normal(size=(rows, classes)) + 2.0 * labels - 1).astype(np.float32)
    teacher[:, 3] = -5.0  # a class that no row has and nobody predicts
    return teacher, (teacher + random.normal(size=(rows, classes)) * [1, 1, 1, 0]).astype(np.float32), labels


def test_the_metrics_are_scikit_learns():
    logits, _, labels = logits_and_labels()
    found, predicted = label_set_metrics(logits, labels, 2.0), logits > 0
    assert found["accuracy"] == pytest.approx((predicted == labels).all(axis=1).mean())
    assert found["micro_f1"] == pytest.approx(f1_score(labels, predicted, average="micro"))
    assert found["macro_f1"] == pytest.approx(f1_score(labels[:, :3], predicted[:, :3], average="macro"))
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = sum(log_loss(labels[:, k], probability[:, k], labels=[0, 1]) for k in range(4))
    assert found["nll"] == pytest.approx(expected)
    assert 0 <= found["ece"] <= 1
    certain = np.where(labels == 1, 30.0, -30.0).astype(np.float32)
    perfect = label_set_metrics(certain, labels, 1.0)
    assert (perfect["accuracy"], perfect["micro_f1"], perfect["macro_f1"]) == (1, 1, 1)
    assert perfect["ece"] == pytest.approx(0, abs=1e-9)


def test_kl_is_that_of_every_class_s_two_outcomes():
    teacher, student, _ = logits_and_labels()
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(len(teacher)):
        for k in range(teacher.shape[1]):
            p, q = (
                torch.sigmoid(torch.tensor(float(side[row, k]), dtype=torch.float64)) for side in (teacher, student)
            )
            expected += p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert mean_binary_kl(teacher, student) == pytest.approx(expected.item() / len(teacher))
    assert mean_binary_kl(teacher, teacher) == 0


def test_the_comparison_is_in_micro_f1_and_its_interval_that_of_resampled_rows():
    teacher, student, labels = logits_and_labels(rows=200)
    control = student[::-1].copy()
    logits = {"teacher": teacher, "student": student, "control": control}
    found = compare_label_sets(labels, logits, resamples=4000, seed=0)
    score = {name: f1_score(labels, values > 0, average="micro") for name, values in logits.items()}
    assert found.retention == pytest.approx(score["student"] / score["teacher"])
    assert found.gain_over_control == pytest.approx(score["student"] - score["control"])
    random, drawn = np.random.default_rng(1), []
    for _ in range(1000):
        rows = random.integers(0, 200, 200)
        sides = [f1_score(labels[rows], side[rows] > 0, average="micro") for side in (teacher, student)]
        drawn.append(sides[1] / sides[0])
    assert found.retention_ci95 == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.02)
    without = compare_label_sets(labels, {"teacher": teacher, "student": teacher}, resamples=100, seed=0)
    assert (without.retention, without.retention_ci95, without.gain_over_control) == (1.0, (1.0, 1.0), None)


def test_the_temperature_is_where_the_likelihood_is_highest():
    logits, _, labels = (torch.from_numpy(values) for values in logits_and_labels(rows=300))
    found = fit_binary_temperature(3 * logits, labels)

    def nll(temperature: float) -> float:
        return torch.nn.functional.binary_cross_entropy_with_logits(
            3 * logits.double() / temperature, labels.double()
        ).item()

    assert nll(found) < min(nll(found * 1.01), nll(found * 0.99))
    assert fit_binary_temperature(logits, labels) == pytest.approx(found / 3, rel=1e-6)
    unknown = torch.cat([labels, torch.full((1, 4), -100, dtype=torch.int8)])
    assert fit_binary_temperature(torch.cat([3 * logits, logits[:1]]), unknown) == pytest.approx(found)


# A run.


@pytest.fixture(scope="module")
def changes(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The small run's tickets with one label, two or none, and a few without a label."""
    folder = tmp_path_factory.mktemp("sets")
    for name in ("train", "test"):
        with open(runs.input / f"{name}.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "category"])
            for number, row in enumerate(rows):
                other = LABELS[(LABELS.index(row["category"]) + 1) % len(LABELS)]
                labels = ["", row["category"], f"{other}; {row['category']}"][number % 3]
                writer.writerow([row["text"], labels])
    (folder / "more.csv").write_text("text\n" + "".join(f"where is parcel number {n}\n" for n in range(9)))
    return {
        "task": "multi_label", "data.train": str(folder / "train.csv"), "data.test": str(folder / "test.csv"),
        "data.label_separator": ";", "data.unlabelled": str(folder / "more.csv"), "train.log_every": 1,
        "train.metric": "micro_f1", "train.learning_rate": 0.01,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(runs: Any, changes: dict[str, Any]) -> Path:
    return runs.finished("prepare", "teach", "train", "evaluate", changes=changes)


def labels_of(folder: Path, split: str) -> np.ndarray:
    store = LocalStore(str(folder))
    return np.concatenate([read_shard(store, e).labels_N for e in manifest(folder, "data").shards(split)])


def test_rows_keep_their_sets_through_the_shards(folder: Path, changes: dict[str, Any]):
    with open(changes["data.train"], encoding="utf-8", newline="") as file:
        wanted = {
            row["text"].strip(): tuple(sorted(filter(None, row["category"].split("; "))))
            for row in csv.DictReader(file)
        }
    assert manifest(folder, "data").facts["labels"] == LABELS
    store, seen = LocalStore(str(folder)), 0
    for shard in read_split(store, manifest(folder, "data").shards("train", "validation")):
        for text, row_K in zip(shard.texts, shard.labels_N, strict=True):
            assert tuple(LABELS[k] for k in np.flatnonzero(row_K)) == wanted[text]
            seen += 1
    assert seen == 60
    assert (labels_of(folder, "unlabelled") == -100).all()


def test_the_loss_is_binary_and_its_parts_add_up(folder: Path):
    for point in points(folder, "train"):
        assert point["loss"] == pytest.approx(0.9 * point["binary_kl"] + 0.1 * point["cross_entropy"], rel=1e-5)
    assert all("binary_kl" not in point for point in points(folder, "train", "control/train"))
    # A control without a teacher starts near log 2 for each class, a softmax over five classes would at log 5.
    first = points(folder, "train", "control/train")[0]["cross_entropy"]
    assert first == pytest.approx(5 * math.log(2), rel=0.1)


def test_validation_and_report_say_what_the_models_themselves_say(folder: Path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder / "student").eval()
    assert model.config.problem_type == "multi_label_classification"
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    store, data = LocalStore(str(folder)), manifest(folder, "data")
    cache, logits, teacher = manifest(folder, "teacher/cache"), {}, {}
    for split in ("validation", "test"):
        texts = [text for shard in read_split(store, data.shards(split)) for text in shard.texts]
        with torch.no_grad():
            inputs = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
            logits[split] = model(**inputs).logits.numpy()
    teacher["validation"] = np.concatenate(
        [read_logits(store, "teacher/cache", e, cache).logits_NK for e in cache.shards("validation")]
    )
    step = manifest(folder, "student").facts["step"]
    point = next(point for point in points(folder, "validation") if point["step"] == step)
    labels, predicted = labels_of(folder, "validation"), logits["validation"] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class without a prediction
        assert point["micro_f1"] == pytest.approx(f1_score(labels, predicted, average="micro"))
    assert point["accuracy"] == pytest.approx((predicted == labels).all(axis=1).mean())
    assert point["agreement"] == pytest.approx((predicted == (teacher["validation"] > 0)).all(axis=1).mean())
    assert point["kl"] == pytest.approx(mean_binary_kl(teacher["validation"], logits["validation"]), rel=1e-3)
    report = json.loads((folder / "report/report.json").read_text())
    student = report["student"]
    labels, predicted = labels_of(folder, "test"), logits["test"] > 0
    assert student["micro_f1"] == pytest.approx(f1_score(labels, predicted, average="micro", zero_division=0))
    assert report["task"] == "multi_label"
    assert report["retention"] == pytest.approx(student["micro_f1"] / report["teacher"]["micro_f1"])
    assert report["gain_over_control"] == pytest.approx(student["micro_f1"] - report["control"]["micro_f1"])
    page = (folder / "report/report.html").read_text()
    assert "micro F1" in page
    assert "all labels right" in page


def test_a_training_that_was_killed_goes_on_to_the_same_weights(folder: Path, runs: Any, changes: dict[str, Any]):
    made = runs.start("prepare")
    assert runs.run(made, "prepare", "teach", changes=changes)["error"] is None
    assert manifest(made, "data").files == manifest(folder, "data").files
    killed = runs.run(made, "train", changes=changes, fault="60:kill")
    assert killed == {"exit": -9}
    assert list(made.glob("train/checkpoints/step-*"))
    assert not (made / "student").exists()
    assert runs.run(made, "train", changes=changes)["error"] is None
    assert equal(student_weights(made), student_weights(folder))


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_other_kinds_train_too_and_a_teacher_is_tuned_with_binary_cross_entropy(
    runs: Any, changes: dict[str, Any], kind: str
):
    asked = {
        **changes,
        "train.loss.kind": kind,
        "train.loss.hard_targets": "teacher",
        "train.loss.label_smoothing": 0.1,
    }
    if kind == "jsd":
        asked["teacher.fine_tune"] = {
            "epochs": 2,
            "learning_rate": 0.01,
            "batch_size": 16,
            "precision": "fp32",
            "metric": "micro_f1",
            "log_every": 1,
        }
        asked["teacher.calibrate"] = True
    else:  # of which units a narrower student keeps, rows with sets of labels and without any decide
        asked["student"] = {"init": "teacher_layers", "layers": [0], "feed_forward": 8}
    made = runs.start("prepare")
    for stage in ("prepare", "teach", "train"):
        answer = runs.run(made, stage, changes=asked)
        assert answer["error"] is None, answer["error"]
    for point in points(made, "train"):
        assert point["loss"] == pytest.approx(0.9 * point[f"binary_{kind}"] + 0.1 * point["cross_entropy"], rel=1e-5)
    if kind == "jsd":
        assert (
            json.loads((made / "teacher/model/config.json").read_text())["problem_type"] == "multi_label_classification"
        )
        assert points(made, "train", "teacher/train")[0]["cross_entropy"] == pytest.approx(5 * math.log(2), rel=0.3)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        *(
            ({"train.loss.kind": kind}, f"train.loss.kind: {kind} compares classes with each other and task:")
            for kind in ("dkd", "dist", "skew_forward_kl", "skew_reverse_kl", "total_variation", "logit_mse")
        ),
        ({"train.loss.standardise": True}, "train.loss.standardise moves the logit at which task: multi_label"),
        ({"task": "classification"}, "train.metric: micro_f1 is accuracy where a row has one label; use accuracy"),
        (
            {"task": "classification", "train.metric": "accuracy"},
            "data.label_separator means nothing with task: classification; remove it",
        ),
    ],
)  # fmt: skip
def test_settings_that_the_task_does_not_know_are_refused(
    runs: Any, changes: dict[str, Any], asked: dict[str, Any], message: str
):
    made = runs.start("prepare")
    answer = runs.run(made, "prepare", changes={**changes, **asked})
    assert message in answer["error"]
    assert len(answer["error"].splitlines()) == 1
    assert not list(made.glob("data/*"))


def test_a_teacher_of_another_task_is_refused(runs: Any, changes: dict[str, Any], tmp_path: Path):
    import shutil

    teacher = shutil.copytree(runs.input / "teacher", tmp_path / "teacher")
    facts = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**facts, "problem_type": "single_label_classification"}))
    made = runs.start("prepare")
    answer = runs.run(made, "prepare", "teach", changes={**changes, "teacher.model": str(teacher)})
    assert "its problem_type is single_label_classification, which does not fit task: multi_label" in answer["error"]
    assert not list(made.glob("data/*"))
