"""Evaluate as a stage: further models, further sets, slices, rows of another task, and what is refused before it."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from small_runs import SmallRuns

from raydistill.cache.shards import read_logits
from raydistill.models.loading import load_classifier
from raydistill.record.commit import read_manifest
from raydistill.record.run import Run, verify
from raydistill.record.store import LocalStore
from raydistill.stages.latency import by_length
from raydistill.tickets import CATEGORIES

pytestmark = pytest.mark.xdist_group("small_runs")
CHANNELS = ("mail", "phone")


def write_rows(path: Path, rows: list[dict[str, str]]) -> str:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def spoken_rows(runs: SmallRuns) -> list[dict[str, str]]:
    """The test rows again under other names of columns, with where each came from."""
    with open(runs.input / "test.csv", newline="") as file:
        found = list(csv.DictReader(file))
    return [{"said": row["text"], "topic": row["category"], "by": CHANNELS[n % 3 == 0]} for n, row in enumerate(found)]


@pytest.fixture(scope="module")
def place(runs: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run without a control whose report has two further sets and a further model, and its input."""
    folder = tmp_path_factory.mktemp("sets")
    spoken = write_rows(folder / "spoken.csv", spoken_rows(runs))
    other = write_rows(folder / "other.csv", [{"text": f"moon {n} and tide"} for n in range(9)])
    shutil.copytree(runs.whole / "student", folder / "again")
    sets = {
        "spoken": {"path": spoken, "text": "said", "label": "topic", "slice_by": "by"},
        "other": {"path": other, "out_of_domain": True},
    }
    return {
        "evaluate.control": False, "evaluate.latency_requests": 16, "evaluate.bootstrap": 100, "evaluate.sets": sets,
        "evaluate.models": {"again": str(folder / "again")}, "evaluate.price_per_hour": 3.6,
    }  # fmt: skip


def start(runs: SmallRuns) -> Path:
    """A new run's folder with a finished student."""
    folder = runs.start("train")
    for part in ("train", "student"):
        shutil.copytree(runs.whole / part, folder / part)
    return folder


@pytest.fixture(scope="module")
def evaluated(runs: SmallRuns, place: dict[str, Any]) -> Path:
    folder = start(runs)
    answer = runs.run(folder, "evaluate", changes=place)
    assert answer["error"] is None
    return folder


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report/report.json").read_text())


def logits_of(folder: Path, texts: list[str]) -> np.ndarray:
    """By transformers alone, one text at a time."""
    from transformers import AutoTokenizer

    model, tokenizer = load_classifier("student", folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.stack([model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]).numpy()


def test_a_further_set_is_measured_whole_and_by_slice(runs: SmallRuns, evaluated: Path):
    rows, found = spoken_rows(runs), report_of(evaluated)["sets"]["spoken"]
    predicted = logits_of(runs.whole / "student", [row["said"] for row in rows]).argmax(1)
    right = np.array([sorted(CATEGORIES)[k] == row["topic"] for k, row in zip(predicted, rows, strict=True)])
    assert found["rows"] == 20
    assert found["models"]["student"]["accuracy"] == pytest.approx(right.mean())
    assert found["models"]["student"]["accuracy"] == report_of(evaluated)["student"]["accuracy"]  # the same rows
    assert [(one["value"], one["rows"]) for one in found["slices"]] == [("mail", 13), ("phone", 7)]
    assert found["slices"][1]["models"]["student"]["accuracy"] == pytest.approx(right[::3].mean())


def test_rows_of_another_task_have_an_auroc(runs: SmallRuns, evaluated: Path):
    found = report_of(evaluated)["sets"]["other"]
    places = ("report/logits/student", "report/sets/other/logits/student")
    logits = torch.from_numpy(np.concatenate([kept_logits(evaluated, place) for place in places])).double()
    certainty = logits.softmax(1).max(1).values.numpy()
    assert found["rows"] == 9
    assert found["models"]["student"]["auroc"] == pytest.approx(roc_auc_score([1] * 20 + [0] * 9, certainty))
    assert found["models"]["student"]["mean_probability"] == pytest.approx(certainty[20:].mean())
    outside = [f"moon {n} and tide" for n in range(9)]
    assert logits[20:].numpy() == pytest.approx(logits_of(runs.whole / "student", outside), abs=1e-4)


def kept_logits(folder: Path, place: str) -> np.ndarray:
    """The logits of test rows that the report was made of."""
    store = LocalStore(str(folder))
    manifest = read_manifest(store, place)
    assert manifest is not None
    return np.concatenate([read_logits(store, place, one, manifest).logits_NK for one in manifest.shards("test")])


def test_a_further_model_stands_beside_the_student(evaluated: Path):
    report = report_of(evaluated)
    (other,) = report["others"]
    assert (other["name"], other["kind"]) == ("again", "model")
    for key in ("accuracy", "nll", "brier", "agreement", "parameters", "size_bytes", "memory_bytes"):
        assert other[key] == report["student"][key], key
    assert other["retention"] == report["retention"]
    student = report["student"]
    assert 0 <= student["memory_bytes"] - 4 * student["parameters"] <= 8192  # float32, and ids of positions
    assert student["cost_per_million"] == pytest.approx(3.6 / 3600 * 1e6 / student["rows_per_second"])
    assert student["latency_ms_p50"] <= student["latency_ms_p90"] <= student["latency_ms_p99"]


def test_the_report_is_complete_and_verified(runs: SmallRuns, evaluated: Path, place: dict[str, Any]):
    _, findings = verify(Run(LocalStore(str(evaluated))))
    assert findings == []
    answer = runs.run(evaluated, "evaluate", changes=place)
    assert "evaluate: complete" in answer["said"]
    page = (evaluated / "report/report.html").read_text()
    assert "spoken, 20 rows" in page
    assert "other, 9 rows" in page


def test_a_report_that_was_killed_goes_on_to_the_same_figures(runs: SmallRuns, evaluated: Path, place: dict[str, Any]):
    folder = start(runs)
    whole = runs.run(start(runs), "evaluate", changes=place)["operations"]
    number = whole.index("rename test-00001.parquet", len(whole) // 2) + 1  # a shard of logits of a further set
    assert runs.run(folder, "evaluate", changes=place, fault=f"{number}:kill") == {"exit": -9}
    answer = runs.run(folder, "evaluate", changes=place)
    assert answer["error"] is None
    assert len(answer["scored"]) < whole.count("rename test-00000.parquet") * 2
    before, after = report_of(evaluated), report_of(folder)
    for name in ("sets", "classes", "retention_ci95", "mcnemar", "reliability", "examples", "curves"):
        assert before[name] == after[name], name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sets": {"x": {"path": "SPOKEN"}}},
            "has no column 'text', it has 'said', 'topic', 'by'. Set evaluate.sets",
        ),
        (
            {"sets": {"x": {"path": "SPOKEN", "text": "said", "label": "by"}}},
            "evaluate.sets.x.path: SPOKEN: label 'mail' (13 rows) is not one of the run's, which are account, billing",
        ),
        (
            {"sets": {"x": {"path": "SPOKEN", "text": "said", "label": "topic", "slice_by": "who"}}},
            "has no column 'who'",
        ),
        ({"sets": {"x": {"path": "nowhere.csv"}}}, "evaluate.sets.x.path: "),
        ({"models": {"x": "./nowhere"}}, "evaluate.models.x: "),
        ({"models": {"student": "./nowhere"}}, "student is the name of something else in the report; take another"),
        (
            {"sets": {"x": {"path": "SPOKEN", "out_of_domain": True, "label": "by"}}},
            "label means nothing with out_of_domain: true, whose rows have no label; remove it",
        ),
        ({"price_per_hour": -1}, "evaluate.price_per_hour: found -1 (number)"),
        ({"devices": ["cuda"]}, "evaluate.devices: found cuda, and the cluster has no GPU"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    runs: SmallRuns, place: dict[str, Any], changes: dict[str, Any], message: str
):
    spoken = place["evaluate.sets"]["spoken"]["path"]
    asked = json.loads(json.dumps(changes).replace("SPOKEN", spoken))
    folder = start(runs)
    before = sorted(folder.rglob("*"))
    answer = runs.run(folder, "evaluate", changes={f"evaluate.{name}": value for name, value in asked.items()})
    assert message.replace("SPOKEN", spoken) in answer["error"]
    assert sorted(folder.rglob("*")) in (before, sorted([*before, folder / ".lock"]))


def test_requests_are_grouped_by_their_tokens():
    lengths, seconds = np.array([3, 9, 3, 5, 7, 5, 9, 3]), np.array([1, 9, 1, 2, 4, 2, 9, 1]) / 1e3
    found = by_length(lengths, seconds)
    assert [one["tokens_to"] for one in found] == [3, 5, 9]
    assert sum(one["requests"] for one in found) == 8
    assert [one["latency_ms_p50"] for one in found] == pytest.approx([1, 2, 9])
