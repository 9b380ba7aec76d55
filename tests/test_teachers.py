"""Targets from several teachers: ensembles, and teachers that score the rows that they have not learned from.

Shapes: N rows, K classes.
"""

import csv
import html
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from loss_oracles import log_softmax
from safetensors.numpy import load_file
from small_runs import SmallRuns
from torch.nn.functional import cross_entropy

from raydistill.cache.shards import read_logits
from raydistill.cli import _main
from raydistill.data.shards import read_shard
from raydistill.models.folders import model_identity
from raydistill.record.commit import Manifest, read_manifest
from raydistill.record.run import Run, leftovers, verify
from raydistill.record.store import LocalStore
from raydistill.tickets import CATEGORIES

LABELS = sorted(CATEGORIES)
TUNING = {"epochs": 1, "learning_rate": 5e-3, "precision": "fp32", "batch_size": 16}
CROSS_FITTED = {"teacher.fine_tune": TUNING, "teacher.cross_fit": 2, "teacher.codec": "dense-float16"}
CLOSE = {"rtol": 2e-3, "atol": 2e-3}  # float16 keeps three digits


def manifest_of(folder: Path, part: str) -> Manifest:
    manifest = read_manifest(LocalStore(str(folder)), part)
    assert manifest is not None
    return manifest


def rows_of(folder: Path, split: str) -> tuple[list[int], list[str], list[int]]:
    """Row ids, texts and labels of a split."""
    found: tuple[list[int], list[str], list[int]] = ([], [], [])
    for entry in manifest_of(folder, "data").shards(split):
        shard = read_shard(LocalStore(str(folder)), entry)
        for column, values in zip(found, (shard.row_ids_N.tolist(), shard.texts, shard.labels_N.tolist()), strict=True):
            column.extend(values)
    return found


def logits_of(folder: Path, place: str, split: str) -> tuple[list[int], np.ndarray]:
    """Row ids and logits of what was scored into a folder."""
    manifest = manifest_of(folder, place)
    shards = [read_logits(LocalStore(str(folder)), place, entry, manifest) for entry in manifest.shards(split)]
    return [i for s in shards for i in s.row_ids_N.tolist()], np.concatenate([s.logits_NK for s in shards])


def said_by(model: Path, texts: list[str]) -> np.ndarray:
    """What a model says of texts one at a time, by Hugging Face's own means, in the alphabetical order of labels."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(model).eval()
    order = [classifier.config.label2id[label] for label in LABELS]
    with torch.no_grad():
        inputs = [tokenizer(text, truncation=True, max_length=48, return_tensors="pt") for text in texts]
        return np.stack([classifier(**one).logits[0, order].numpy() for one in inputs])


def page_of(folder: Path) -> str:
    return html.unescape((folder / "report/report.html").read_text())


def folds_of(folder: Path) -> dict[int, int]:
    tables = [pq.read_table(path) for path in sorted((folder / "teacher/folds").glob("*.parquet"))]
    return {i: k for t in tables for i, k in zip(t["row_id"].to_pylist(), t["fold"].to_pylist(), strict=True)}


def products(folder: Path) -> dict[str, bytes]:
    """What a run is for: folds, weights of every model, cache, its passes. Without plans that name other folders."""
    aside = set(leftovers(Run(LocalStore(str(folder)))))
    names = [*folder.glob("teacher/**/*.parquet"), *folder.glob("teacher/**/model/*.safetensors")]
    names += [*folder.glob("teacher/cache/**/*.json"), *folder.glob("teacher/folds/*.json"), *folder.glob("student/*s")]
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in names}
    return {name: data for name, data in found.items() if name not in aside}


def inodes(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_ino for path in folder.glob("teacher/**/*.parquet")}


# --- cross-fitting


@pytest.fixture(scope="module")
def crossed(runs: SmallRuns) -> tuple[Path, dict[str, Any]]:
    folder = runs.folder / "crossed"
    answer = runs.run(folder, "prepare", "teach", "train", "evaluate", changes=CROSS_FITTED)
    assert answer["error"] is None
    return folder, answer


def test_each_row_has_the_output_of_the_teacher_that_has_not_seen_it(crossed):
    folder, folds = crossed[0], folds_of(crossed[0])
    ids, texts, _ = rows_of(folder, "train")
    row_ids, cached_NK = logits_of(folder, "teacher/cache", "train")
    assert row_ids == ids
    assert sorted(folds) == ids
    outputs = [said_by(folder / f"teacher/fold-{fold}/model", texts) for fold in (0, 1)]
    assert not np.allclose(outputs[0], outputs[1], **CLOSE)
    expected = np.stack([outputs[folds[i]][n] for n, i in enumerate(ids)])
    np.testing.assert_allclose(cached_NK, expected, **CLOSE)
    validation = rows_of(folder, "validation")[1]
    np.testing.assert_allclose(
        logits_of(folder, "teacher/cache", "validation")[1], said_by(folder / "teacher/model", validation), **CLOSE
    )


def test_each_teacher_learns_from_the_rows_outside_its_fold(crossed):
    folder, answer = crossed
    folds = list(folds_of(folder).values())
    train = len(folds)
    learned_from = [post["rows"] for post in answer["posts"] if "rows" in post and "steps" in post]
    assert learned_from == [train, train - folds.count(0), train - folds.count(1), train, train]  # + student, control
    weights = [load_file(folder / "teacher" / p / "model/model.safetensors") for p in (".", "fold-0", "fold-1")]
    name = "classifier.weight"
    assert not any(np.array_equal(weights[a][name], weights[b][name]) for a, b in ((0, 1), (1, 2), (0, 2)))


def test_the_folds_are_stratified_and_hold_equal_texts_together(crossed):
    folder, folds = crossed[0], folds_of(crossed[0])
    ids, texts, labels = rows_of(folder, "train")
    of_text: dict[str, int] = {}
    for i, text in zip(ids, texts, strict=True):
        assert of_text.setdefault(text.lower(), folds[i]) == folds[i]
    for label in set(labels):
        mine = [folds[i] for i, of in zip(ids, labels, strict=True) if of == label]
        assert abs(mine.count(0) - mine.count(1)) <= 1 + len(texts) - len(of_text)


def test_one_forward_for_each_row_and_the_report_says_what_the_teacher_is(crossed):
    folder = crossed[0]
    facts = manifest_of(folder, "teacher/cache").facts
    assert (
        facts["forwards"] == facts["rows"] == len(rows_of(folder, "train")[0]) + len(rows_of(folder, "validation")[0])
    )
    report = json.loads((folder / "report/report.json").read_text())
    assert report["teacher_forwards_per_row"] == 1
    assert report["cross_fit"] == 2
    assert "a teacher trained without the row's fold, one of 2" in page_of(folder)
    assert {"folds", "teacher", "teacher/fold-0", "teacher/fold-1", "cache"} <= set(report["fingerprints"])
    _, texts, labels = rows_of(folder, "test")
    right = said_by(folder / "teacher/model", texts).argmax(axis=1) == labels
    assert report["teacher"]["accuracy"] == pytest.approx(right.mean())


def test_a_second_run_status_verify_and_redo_know_every_teacher(runs: SmallRuns, crossed, capsys):
    folder = runs.folder / "crossed-again"
    shutil.copytree(crossed[0], folder)
    again = runs.run(folder, "prepare", "teach", changes=CROSS_FITTED)
    assert (again["error"], again["posts"], again["scored"]) == (None, [], [])
    assert _main(["status", str(folder)]) == 0
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[1:9]] == [
        "data", "folds", "teacher", "teacher/fold-0", "teacher/fold-1", "cache", "student", "control",
    ]  # fmt: skip
    assert table.count("complete") >= 9
    assert verify(Run(LocalStore(str(folder))))[1] == []
    other = {**CROSS_FITTED, "teacher.cross_fit": 3}
    refused = runs.run(folder, "teach", changes=other)
    assert f"{folder}/teacher/folds: teacher.cross_fit: was made with 2, now asked for 3" in refused["error"]
    before = products(folder)
    assert runs.run(folder, "teach", changes=other, redo="teach")["error"] is None
    for part in ("train", "fold-0/train", "fold-1/model", "fold-0/model"):
        assert (folder / f"teacher/{part}.1").is_dir()
    assert (folder / "teacher/fold-1/model.1/model.safetensors").read_bytes() == before[
        "teacher/fold-1/model/model.safetensors"
    ]
    assert set(folds_of(folder).values()) == {0, 1, 2}
    left = leftovers(Run(LocalStore(str(folder))))
    assert "teacher/fold-1/model.1/model.safetensors" in left
    assert not any(name.startswith("teacher/fold-1/model/") for name in left)


def test_a_lender_lends_its_cross_fitted_cache_to_one_that_asks_for_the_same(runs: SmallRuns, crossed):
    folder = runs.folder / "crossed-borrower"
    lent = {**CROSS_FITTED, "teacher.cache_from": str(crossed[0])}
    answer = runs.run(folder, "prepare", "teach", "train", changes=lent)
    assert (answer["error"], answer["scored"]) == (None, [])
    assert (folder / "student/model.safetensors").read_bytes() == (
        crossed[0] / "student/model.safetensors"
    ).read_bytes()
    more = runs.run(folder, "teach", changes={**lent, "teacher.cross_fit": 3})
    assert f"{crossed[0]}/teacher/fold-2: is missing. Ask for the teachers that run has" in more["error"]
    fewer = runs.run(folder, "teach", changes={k: v for k, v in lent.items() if k != "teacher.cross_fit"})
    assert "teacher.cross_fit: was made with 2, now asked for nothing" in fewer["error"]


@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.8, 0.9, 0.97])
def test_cross_fitting_killed_anywhere_goes_on_to_the_same_bytes(runs: SmallRuns, crossed, share: float):
    folder = runs.folder / f"crossed-killed-{share}"
    folder.mkdir()
    shutil.copytree(crossed[0] / "data", folder / "data")
    operations = crossed[1]["operations"]
    last = operations.index("rename student") if "rename student" in operations else len(operations)
    first = operations.index("rename plan.json", 1)
    number = int(share * (last - first) * 0.6)
    assert runs.run(folder, "teach", changes=CROSS_FITTED, fault=f"{number}:kill") == {"exit": -9}
    kept = {path: node for path, node in inodes(folder).items() if path.with_suffix(".json").exists()}
    answer = runs.run(folder, "teach", changes=CROSS_FITTED)
    assert answer["error"] is None
    whole = {name: data for name, data in products(crossed[0]).items() if name.startswith("teacher")}
    assert products(folder) == whole
    assert {path: inodes(folder)[path] for path in kept} == kept, "what was committed was made again"
    assert verify(Run(LocalStore(str(folder))))[1] == []


# --- ensembles


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, ticket_texts: list[str]) -> tuple[Path, Path]:
    """Two classifiers of the tickets: other tokenizers, sizes and orders of the labels."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    from raydistill.demo import write_new_bert

    found = []
    for number, (width, labels, words) in enumerate([(16, LABELS, 200), (24, LABELS[::-1], 120)]):
        folder = tmp_path_factory.mktemp("ensemble")
        write_new_bert(
            folder / "encoder", ticket_texts, hidden_size=width, layers=1, heads=2, vocabulary=words, seed=number
        )
        torch.manual_seed(number)
        model = BertForSequenceClassification.from_pretrained(
            folder / "encoder", num_labels=len(labels), id2label=dict(enumerate(labels)),
            label2id={name: n for n, name in enumerate(labels)},
        )  # fmt: skip
        torch.nn.init.normal_(model.classifier.weight, std=1.0)
        model.save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(folder / "encoder").save_pretrained(folder / "model")
        found.append(folder / "model")
    return found[0], found[1]


def pair(models: tuple[Path, Path], **changes: Any) -> dict[str, Any]:
    first, second = map(str, models)
    return {
        "teacher.model": first, "teacher.members": [{"model": second, "weight": 3.0}],
        "teacher.codec": "dense-float16", **{f"teacher.{name}": value for name, value in changes.items()},
    }  # fmt: skip


def mean_of(combine: str, outputs: list[np.ndarray], weights: list[float]) -> np.ndarray:
    """The weighted mean in float64, one row and class after another."""
    shares = [weight / sum(weights) for weight in weights]
    if combine == "logits":
        return sum(s * o.astype(np.float64) for s, o in zip(shares, outputs, strict=True))  # type: ignore[return-value]
    logs = [np.array([log_softmax(row, 1.0) for row in o.astype(np.float64).tolist()]) for o in outputs]
    return np.log(sum(s * np.exp(o) for s, o in zip(shares, logs, strict=True)))


@pytest.fixture(scope="module", params=["logits", "probabilities"])
def mixed(request: pytest.FixtureRequest, runs: SmallRuns, models) -> tuple[Path, str, dict[str, Any]]:
    combine = request.param
    folder = runs.folder / f"mixed-{combine}"
    changes = pair(models, weight=2.0, **({"combine": combine} if combine != "logits" else {}))
    answer = runs.run(folder, "prepare", "teach", "train", "evaluate", changes=changes)
    assert answer["error"] is None
    return folder, combine, changes


def test_an_ensembles_cache_is_the_mean_by_label_name_each_by_its_own_tokens(mixed, models):
    folder, combine, _ = mixed
    for split in ("train", "validation"):
        ids, texts, _ = rows_of(folder, split)
        row_ids, cached_NK = logits_of(folder, "teacher/cache", split)
        assert row_ids == ids
        expected = mean_of(combine, [said_by(model, texts) for model in models], [2.0, 3.0])
        np.testing.assert_allclose(cached_NK, expected, **CLOSE)
    facts = manifest_of(folder, "teacher/cache").facts
    assert facts["forwards"] == 2 * facts["rows"]


def test_the_report_measures_the_ensemble_as_the_teacher(mixed, models):
    from transformers import AutoModelForSequenceClassification

    folder, combine, _ = mixed
    report = json.loads((folder / "report/report.json").read_text())
    _, texts, labels = rows_of(folder, "test")
    outputs = [said_by(model, texts) for model in models]
    expected = mean_of(combine, outputs, [2.0, 3.0])
    nll = cross_entropy(torch.from_numpy(expected), torch.tensor(labels)).item()
    assert report["teacher"]["accuracy"] == (expected.argmax(axis=1) == labels).mean()
    assert report["teacher"]["nll"] == pytest.approx(nll, rel=1e-5)
    alone = [(output.argmax(axis=1) == labels).mean() for output in outputs]
    assert [member["accuracy"] for member in report["teacher_members"]] == alone
    assert [member["weight"] for member in report["teacher_members"]] == [2.0, 3.0]
    sizes = [AutoModelForSequenceClassification.from_pretrained(model).num_parameters() for model in models]
    assert report["teacher"]["parameters"] == sum(sizes)
    assert report["teacher"]["size_bytes"] == sum((model / "model.safetensors").stat().st_size for model in models)
    assert report["teacher_forwards_per_row"] == 2
    page = page_of(folder)
    assert f"the mean of 2 models' {combine}" in page
    assert "ran 2 times for each" in page


def test_the_weights_are_normalised_and_part_of_what_the_cache_is(runs: SmallRuns, mixed):
    folder, _, changes = mixed
    scaled = {**changes, "teacher.weight": 4.0}
    refused = runs.run(folder, "teach", changes=scaled)
    assert f"{folder}/teacher/cache: teachers" in refused["error"]
    scaled["teacher.members"] = [{**changes["teacher.members"][0], "weight": 6.0}]
    other = runs.folder / f"{folder.name}-scaled"
    assert runs.run(other, "prepare", "teach", changes=scaled)["error"] is None
    for path in (folder / "teacher/cache").glob("*.parquet"):
        assert (other / "teacher/cache" / path.name).read_bytes() == path.read_bytes()


def test_an_ensemble_killed_while_its_members_score_or_are_merged_goes_on(runs: SmallRuns, mixed):
    folder, _, changes = mixed
    whole = {name: data for name, data in products(folder).items() if name.startswith("teacher")}
    place = runs.folder / f"{folder.name}-counted"
    place.mkdir()
    shutil.copytree(folder / "data", place / "data")
    operations = runs.run(place, "teach", changes=changes)["operations"]
    assert products(place) == whole
    begin = operations.index("mkdir cache")  # config.yaml stands from the first time on
    for number in range(2, len(operations) - begin, 9):
        shutil.rmtree(place / "teacher")
        assert runs.run(place, "teach", changes=changes, fault=f"{number}:kill") == {"exit": -9}
        kept = {path: node for path, node in inodes(place).items() if path.with_suffix(".json").exists()}
        assert runs.run(place, "teach", changes=changes)["error"] is None
        assert products(place) == whole
        assert {path: inodes(place)[path] for path in kept} == kept, "what was committed was made again"
    assert verify(Run(LocalStore(str(place))))[1] == []


def test_seeds_and_folds_together(runs: SmallRuns):
    folder = runs.folder / "teachers-seeds"
    changes = {**CROSS_FITTED, "teacher.fine_tune_seeds": [0, 5]}
    answer = runs.run(folder, "prepare", "teach", changes=changes)
    assert answer["error"] is None
    ids, texts, _ = rows_of(folder, "train")
    folds = folds_of(folder)
    means = []
    for fold in (0, 1):
        parts = [folder / f"teacher/fold-{fold}/model", folder / f"teacher/member-1/fold-{fold}/model"]
        outputs = [said_by(part, texts) for part in parts]
        assert not np.allclose(*outputs, **CLOSE)
        means.append(mean_of("logits", outputs, [1.0, 1.0]))
    expected = np.stack([means[folds[i]][n] for n, i in enumerate(ids)])
    np.testing.assert_allclose(logits_of(folder, "teacher/cache", "train")[1], expected, **CLOSE)
    plans = [Run(LocalStore(str(folder))).plan(part) for part in ("teacher", "teacher/member-1")]
    assert [plan and plan.inputs["teacher.fine_tune.seed"] for plan in plans] == [0, 5]
    assert manifest_of(folder, "teacher/cache").facts["forwards"] == 2 * 60


def test_features_are_those_of_the_named_member_beside_the_training_or_cached(runs: SmallRuns):
    folder = runs.folder / "teachers-named"
    seeds = {"teacher.fine_tune": TUNING, "teacher.fine_tune_seeds": [0, 5]}
    assert runs.run(folder, "prepare", "teach", changes=seeds)["error"] is None
    features = {"train.loss.features": [{"kind": "hidden_mse", "layers": [[0, 0]]}], "train.log_every": 1}
    curves, weights = {}, {}
    for name, settings in {
        "beside": {"teacher.features_of": 1},
        "cached": {"teacher.features_of": 1, "train.loss.features_from": "cache"},
        "other": {"teacher.features_of": 0},
    }.items():
        place = runs.folder / f"teachers-named-{name}"
        shutil.copytree(folder, place)
        answer = runs.run(place, "teach", "train", changes={**seeds, **features, **settings})
        assert answer["error"] is None
        assert len(answer["scored"]) == (4 if name == "cached" else 0)  # the student's shards, once more, by one member
        points = map(json.loads, (place / "train/metrics.jsonl").read_text().splitlines())
        curves[name] = [point["hidden_mse"] for point in points if "hidden_mse" in point]
        weights[name] = (place / "student/model.safetensors").read_bytes()
    assert len(curves["beside"]) == 8
    assert curves["cached"] == pytest.approx(curves["beside"], rel=2e-3)
    assert curves["other"][0] != pytest.approx(curves["beside"][0], rel=2e-3)
    assert weights["other"] != weights["beside"]
    cached = Run(LocalStore(str(runs.folder / "teachers-named-cached")))
    plan, manifest = cached.plan("features"), cached.require("features")
    assert plan is not None
    assert plan.inputs["teacher"] == model_identity(folder / "teacher/member-1/model")
    assert sum(entry.rows for entry in manifest.files) == len(rows_of(folder, "train")[0])
    assert verify(cached)[1] == []
    refused = runs.run(
        runs.folder / "teachers-named-other", "train", changes={**seeds, **features, "teacher.features_of": 1}
    )
    assert "teacher.features_of: was made with 0, now asked for 1" in refused["error"]


def test_sets_of_labels_and_texts_without_any(runs: SmallRuns, tmp_path: Path):
    for name in ("train", "test"):
        with open(runs.input / f"{name}.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        lines = [f'"{r["text"]}","{r["category"]}{";billing" * (n % 2)}"' for n, r in enumerate(rows)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,category", *lines]))
    (tmp_path / "more.csv").write_text("text\n" + "".join(f"where is parcel number {n}\n" for n in range(9)))
    folder = runs.folder / "teachers-sets"
    answer = runs.run(
        folder, "prepare", "teach", "train",
        changes={
            **CROSS_FITTED, "task": "multi_label", "data.train": str(tmp_path / "train.csv"), "train.metric": "nll",
            "data.test": str(tmp_path / "test.csv"), "data.label_separator": ";",
            "data.unlabelled": str(tmp_path / "more.csv"), "teacher.fine_tune_seeds": [0, 5],
            "teacher.combine": "probabilities",
        },
    )  # fmt: skip
    assert answer["error"] is None
    folds, labels = folds_of(folder), manifest_of(folder, "data").facts["labels"]
    assert labels == LABELS

    def expected(texts: list[str], fold: str) -> np.ndarray:
        parts = [folder / f"teacher/{member}{fold}/model" for member in ("", "member-1/")]
        return np.mean([1 / (1 + np.exp(-said_by(part, texts).astype(np.float64))) for part in parts], axis=0)

    for split in ("train", "validation", "unlabelled"):
        ids, texts, _ = rows_of(folder, split)
        row_ids, cached_NK = logits_of(folder, "teacher/cache", split)
        assert row_ids == ids
        wanted = expected(texts, "")
        if split == "train":
            by_fold = [expected(texts, f"fold-{fold}") for fold in (0, 1)]
            wanted = np.stack([by_fold[folds[i]][n] for n, i in enumerate(ids)])
        np.testing.assert_allclose(1 / (1 + np.exp(-cached_NK.astype(np.float64))), wanted, atol=1e-3)
    assert sorted(folds) == rows_of(folder, "train")[0]
