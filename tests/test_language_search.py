"""A search over students of a language model: trials on whole documents, from the one cache."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from run_files import column, equal, facts, manifest, points, student_weights

TUNE = {
    "space": {"train.learning_rate": {"choice": [1e-2, 1e-4, 3e-3]}}, "trials": 3, "search": "grid",
    "data_fraction": 0.5, "scheduler": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def searched(language_runs) -> tuple[Path, dict[str, Any]]:
    folder = language_runs.start("train")
    answer = language_runs.run(folder, "tune", "train", changes={"tune": TUNE})
    assert answer["error"] is None, answer["error"]
    return folder, answer


def test_trials_learn_from_half_of_the_documents_whole(language_runs, searched):
    folder, _ = searched
    share = manifest(folder, "tune/rows")
    chosen: list[bool] = []
    for entry in manifest(folder, "data").shards("train"):
        folds = pq.read_table(folder / "tune/rows" / entry.file)["fold"].to_numpy()
        chosen += (folds == 0).tolist()
    documents, tokens = column(folder, "train", "document"), column(folder, "train", "tokens")
    parts: dict[int, set[bool]] = {}
    for document, is_chosen in zip(documents, chosen, strict=True):
        parts.setdefault(document, set()).add(is_chosen)
    assert all(len(found) == 1 for found in parts.values())
    assert len(documents) > len(parts)  # some documents have several rows
    assert sum(found == {True} for found in parts.values()) == -(-len(parts) // 2)
    assert share.facts["tokens"] == sum(len(row) for row, is_chosen in zip(tokens, chosen, strict=True) if is_chosen)


def test_the_winner_has_the_lowest_nll_and_is_what_train_takes(searched):
    folder, answer = searched
    found = facts(folder, "tune")
    assert found["metric"] == "nll"
    trials = pq.read_table(folder / "tune/trials.parquet").to_pylist()
    values = {trial["trial"]: trial["nll"] for trial in trials}
    assert found["winner"]["number"] == min(values, key=lambda number: values[number])
    assert found["winner"]["point"]["train.learning_rate"] == 1e-2
    plan = json.loads((folder / "train/plan.json").read_text())
    assert plan["inputs"]["train.learning_rate"] == 1e-2
    assert (folder / "tune/report.html").read_text().count("nll") > 0
    assert found["teacher_forwards_per_row"] == 1
    assert answer["error"] is None


def test_a_trial_on_all_documents_is_the_training_itself(language_runs):
    whole = {**TUNE, "space": {"train.learning_rate": {"choice": [1e-2]}}, "trials": 1, "data_fraction": 1.0}
    folder = language_runs.start("train")
    answer = language_runs.run(folder, "tune", "train", changes={"tune": whole})
    assert answer["error"] is None
    assert equal(student_weights(folder), student_weights(language_runs.whole))
    (trial,) = pq.read_table(folder / "tune/trials.parquet").to_pylist()
    assert trial["nll"] == pytest.approx(min(point["nll"] for point in points(folder, "validation")), rel=1e-5)


def test_a_search_that_was_killed_goes_on_to_the_same_trials(language_runs, searched):
    whole, done = searched
    epochs = [place for place, name in enumerate(done["operations"]) if name.startswith("rename step-")]
    number = epochs[2] + 1  # in the second of the trials, which have two epochs
    folder = language_runs.start("train")
    assert language_runs.run(folder, "tune", "train", changes={"tune": TUNE}, fault=f"{number}:kill") == {"exit": -9}
    answer = language_runs.run(folder, "tune", "train", changes={"tune": TUNE})
    assert answer["error"] is None
    tables = [pq.read_table(place / "tune/trials.parquet").to_pylist() for place in (folder, whole)]
    kept = [[{k: v for k, v in row.items() if "seconds" not in k} for row in table] for table in tables]
    assert kept[0] == kept[1]
    assert equal(student_weights(folder), student_weights(whole))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**TUNE, "metric": "macro_f1"}, "tune.metric: macro_f1 is of classes; with task: causal_lm use nll"),
        ({**TUNE, "fused": True}, "tune.fused: true, and student: a model of the type llama cannot be stacked"),
        ({**TUNE, "space": {"train.loss.temperature": {"choice": [1.0, 2.0]}}, "trials": 2},
         "tune.space: train.loss.temperature=2.0: train.loss.temperature: temperature 2: a cache of codec sampled"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(language_runs, changes: dict, message: str):
    folder = language_runs.start("train")
    answer = language_runs.run(folder, "tune", changes={"tune": changes})
    assert message in answer["error"]
    assert not (folder / "tune").exists()
