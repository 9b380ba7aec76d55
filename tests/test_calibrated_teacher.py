"""`teacher.calibrate`: one temperature, fitted on validation, divides the cached logits wherever they are read.

Shapes: N rows, K classes.
"""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loss_oracles import log_softmax
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from small_runs import SmallRuns
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from raydistill.cache.shards import read_logits, write_logits
from raydistill.cli import _main
from raydistill.data.shards import ShardWriter, read_shard
from raydistill.data.sources import Row
from raydistill.errors import UserError
from raydistill.record.commit import commit_manifest, read_manifest
from raydistill.record.run import Run, verify
from raydistill.record.store import LocalStore
from raydistill.stages.calibration import calibrate
from raydistill.stages.progress import Progress

CALIBRATED = {"teacher.calibrate": True}
HALF = {"data.validation": 0.4, "teacher.codec": "dense-float16"}  # enough rows to fit a temperature to


@pytest.fixture(scope="module")
def taught(runs: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with data and cache of a teacher that knows something, and the settings that go on with it."""
    model = tmp_path_factory.mktemp("teacher") / "model"
    shutil.copytree(runs.input / "teacher", model)
    teach_the_head(model, runs.input / "train.csv")
    settings = {**HALF, "teacher.model": str(model)}
    folder = runs.folder / "calibrated-taught"
    assert runs.run(folder, "prepare", "teach", changes=settings)["error"] is None
    return folder, settings


def teach_the_head(model: Path, train: Path) -> None:
    """Logistic regression on the encoder's output, times 3: convex, so that every machine finds the same teacher."""
    classifier = AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.no_grad():  # so that texts differ in what comes out
        for weight in classifier.base_model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    tokenizer = AutoTokenizer.from_pretrained(model)
    with open(train, newline="") as file:
        rows = list(csv.DictReader(file))
    batch = tokenizer([row["text"] for row in rows], padding=True, truncation=True, max_length=48, return_tensors="pt")
    with torch.no_grad():
        pooled_ND = classifier.base_model(**batch).pooler_output.double().numpy()
    labels = [classifier.config.label2id[row["category"]] for row in rows]
    centre_D, width_D = pooled_ND.mean(0), pooled_ND.std(0)
    head = LogisticRegression(C=100, max_iter=10_000, tol=1e-9).fit((pooled_ND - centre_D) / width_D, labels)
    assert 0.5 < head.score((pooled_ND - centre_D) / width_D, labels) < 0.95
    weight_KD = 3 * head.coef_ / width_D
    with torch.no_grad():
        classifier.classifier.weight.copy_(torch.from_numpy(weight_KD))
        classifier.classifier.bias.copy_(torch.from_numpy(3 * head.intercept_ - weight_KD @ centre_D))
    classifier.save_pretrained(model)


def copied(taught: tuple[Path, dict[str, Any]], name: str) -> Path:
    folder = taught[0].parent / f"calibrated-{name}"
    shutil.copytree(taught[0], folder)
    return folder


def cached(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The cached logits of a split and its labels."""
    store = LocalStore(str(folder))
    data, cache = read_manifest(store, "data"), read_manifest(store, "teacher/cache")
    assert data is not None
    assert cache is not None
    labels_N = np.concatenate([read_shard(store, entry).labels_N for entry in data.shards(split)])
    shards = [read_logits(store, "teacher/cache", entry, cache).logits_NK for entry in cache.shards(split)]
    return np.concatenate(shards), labels_N


def temperature_of(folder: Path) -> float:
    manifest = read_manifest(LocalStore(str(folder)), "teacher/calibration")
    assert manifest is not None
    return manifest.facts["temperature"]


def curve(folder: Path) -> list[dict[str, float]]:
    points = map(json.loads, (folder / "train/metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in point.items() if name != "rows_per_second"} for point in points]


def student(folder: Path) -> bytes:
    return (folder / "student/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def calibrated(runs: SmallRuns, taught) -> Path:
    folder = copied(taught, "whole")
    answer = runs.run(folder, "teach", "train", "evaluate", changes={**taught[1], **CALIBRATED})
    assert answer["error"] is None
    assert answer["scored"][:1] == ["validation-00000.parquet"]  # by evaluate: the cache stands
    return folder


def test_the_temperature_is_the_best_one_on_validation(calibrated: Path):
    logits_NK, labels_N = cached(calibrated, "validation")

    def nll(temperature: float) -> float:
        rows = zip(logits_NK.astype(float).tolist(), labels_N.tolist(), strict=True)
        return -sum(log_softmax(row, temperature)[label] for row, label in rows)

    found = temperature_of(calibrated)
    assert abs(found - 1) > 0.05, "a temperature of 1 would show nothing"
    assert all(nll(found) < nll(found * factor) for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0))


def test_the_student_is_that_of_a_cache_that_holds_the_divided_logits(runs: SmallRuns, taught, calibrated: Path):
    folder = copied(taught, "divided-cache")
    store, cache = LocalStore(str(folder)), read_manifest(LocalStore(str(folder)), "teacher/cache")
    assert cache is not None
    entries = []
    for entry in cache.files:
        shard = read_logits(store, "teacher/cache", entry, cache)
        divided_NK = (shard.logits_NK / np.float32(temperature_of(calibrated))).astype(np.float32)
        name = f"teacher/cache/{entry.file}"
        entries.append(
            write_logits(store, name, shard.row_ids_N, divided_NK, codec="dense-float32", fingerprint=cache.fingerprint)
        )
    commit_manifest(store, "teacher/cache", cache.fingerprint, entries, {**cache.facts, "codec": "dense-float32"})
    assert runs.run(folder, "train", changes=taught[1])["error"] is None
    assert student(folder) == student(calibrated)
    assert curve(folder) == curve(calibrated)


def test_the_student_is_that_of_a_teacher_whose_head_was_divided(
    runs: SmallRuns, taught, calibrated: Path, tmp_path: Path
):
    shutil.copytree(taught[1]["teacher.model"], tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name] / temperature_of(calibrated)
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    settings = {**taught[1], "teacher.model": str(tmp_path / "model")}
    divided, raw = runs.folder / "calibrated-divided-head", copied(taught, "raw")
    assert runs.run(divided, "prepare", "teach", "train", changes=settings)["error"] is None
    assert runs.run(raw, "train", changes=taught[1])["error"] is None
    # The head's logits are rounded to float16 after the division, the cache's before it.
    for ours, theirs, other in zip(curve(calibrated), curve(divided), curve(raw), strict=True):
        assert ours.pop("group") == theirs.pop("group")
        assert ours == pytest.approx(theirs, rel=2e-3)
        assert ours["kl"] != pytest.approx(other["kl"], rel=2e-3)


def test_the_report_has_the_calibrated_teacher(calibrated: Path):
    report = json.loads((calibrated / "report/report.json").read_text())
    temperature = temperature_of(calibrated)
    assert report["teacher_temperature"] == temperature
    assert f"divided by {temperature:g}" in (calibrated / "report/report.html").read_text()
    store = LocalStore(str(calibrated))
    manifest, data = read_manifest(store, "report/logits/teacher"), read_manifest(store, "data")
    assert manifest is not None
    assert data is not None
    raw_NK = np.concatenate([read_logits(store, "report/logits/teacher", e, manifest).logits_NK
                             for e in manifest.shards("test")])  # fmt: skip
    labels_N = np.concatenate([read_shard(store, entry).labels_N for entry in data.shards("test")])
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(raw_NK).double() / temperature, torch.from_numpy(labels_N).long()
    )
    assert report["teacher"]["nll"] == pytest.approx(expected.item(), rel=1e-5)
    assert report["teacher"]["temperature"] == pytest.approx(1, abs=0.02)  # nothing is left to fit


def test_a_calibration_that_was_killed_goes_on_to_the_same_bytes(runs: SmallRuns, taught, calibrated: Path):
    settings = {**taught[1], **CALIBRATED}
    whole = runs.run(copied(taught, "counted"), "teach", changes=settings)
    operations = whole["operations"]
    assert "rename plan.json" in operations
    for number in range(1, len(operations) + 1):
        folder = copied(taught, f"killed-{number}")
        assert runs.run(folder, "teach", changes=settings, fault=f"{number}:kill") == {"exit": -9}
        answer = runs.run(folder, "teach", changes=settings)
        assert (answer["error"], answer["scored"]) == (None, [])
        for name in ("MANIFEST.json", "plan.json"):
            ours = folder / "teacher/calibration" / name
            assert ours.read_bytes() == (calibrated / "teacher/calibration" / name).read_bytes()
        assert verify(Run(LocalStore(str(folder))))[1] == []


def test_students_with_and_without_it_are_not_confused(runs: SmallRuns, taught, calibrated: Path):
    folder = copied(taught, "confused")
    early = runs.run(folder, "train", changes={**taught[1], **CALIBRATED})
    assert early["error"] == (
        f"{folder}/teacher/calibration: is not complete. Run `raydistill teach` with its config first"
    )
    assert not (folder / "train").exists()
    assert runs.run(folder, "train", changes=taught[1])["error"] is None
    assert runs.run(folder, "teach", changes={**taught[1], **CALIBRATED})["error"] is None
    later = runs.run(folder, "train", changes={**taught[1], **CALIBRATED})
    assert f"{folder}/train: teacher.calibrate: was made with nothing, now asked for " in later["error"]


def test_a_cache_that_is_lent_is_calibrated_by_its_borrower(runs: SmallRuns, taught, calibrated: Path, capsys):
    lender = copied(taught, "lender")
    before = {path: path.read_bytes() for path in lender.rglob("*") if path.is_file()}
    folder = runs.folder / "calibrated-borrower"
    settings = {**taught[1], **CALIBRATED, "teacher.cache_from": str(lender)}
    answer = runs.run(folder, "prepare", "teach", "train", changes=settings)
    assert answer["error"] is None
    assert student(folder) == student(calibrated)
    assert {path: path.read_bytes() for path in lender.rglob("*") if path.is_file()} == before
    assert _main(["status", str(folder)]) == 0
    states = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert all("complete" in states[part] for part in ("data", "cache", "calibration", "student"))
    assert "next is evaluate" in states["next"]


@pytest.mark.parametrize(
    ("margin", "found"),
    [
        (8.0, "teacher is right on all 4 validation rows,"),
        (1e-3, "teacher's logits on the 4 validation rows are all within 0.001 of 0,"),
        (-8.0, "teacher's logits fit the labels of the 4 validation rows no better than chance,"),
    ],
)
def test_a_validation_that_no_temperature_fits_is_refused(tmp_path: Path, margin: float, found: str):
    store, labels = LocalStore(str(tmp_path)), [0, 1, 2, 1]
    writer = ShardWriter(store, "validation", first_row_id=7, shard_rows=16, fingerprint="d")
    for number, label in enumerate(labels):
        writer.add(Row(f"text {number}", "", 0, number), label)
    commit_manifest(store, "data", "d", writer.close(), {})
    logits_NK = (margin * np.eye(3)[labels]).astype(np.float32)
    name, facts = "teacher/cache/validation-00000.parquet", {"codec": "dense-float32", "classes": 3}
    entry = write_logits(store, name, np.arange(7, 11), logits_NK, codec="dense-float32", fingerprint="c")
    commit_manifest(store, "teacher/cache", "c", [entry], facts)
    with pytest.raises(UserError, match=f"^teacher.calibrate: the {found} so that.*false$"):
        calibrate(Run(store), Progress(lambda line: None))
    assert read_manifest(store, "teacher/calibration") is None
