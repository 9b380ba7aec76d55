"""Stages of one training: each a training by itself, from what the one before made; the student is the last one's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_files import equal, points, student_weights
from safetensors.numpy import load_file
from small_runs import SmallRuns

from raydistill.cache.shards import read_logits
from raydistill.config.run import Config
from raydistill.config.train import Stage, Train
from raydistill.data.shards import read_split
from raydistill.record.commit import read_manifest
from raydistill.record.run import Run, find_run, verify
from raydistill.record.store import LocalStore
from raydistill.stages.preflight import cost
from raydistill.stages.status import standings
from raydistill.stages.training_stages import training_stages

pytestmark = [pytest.mark.xdist_group("small_runs"), pytest.mark.timeout(1800)]
SIZES = {"init": "config", "hidden_size": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.1}


def staged(runs: SmallRuns, *stages: dict[str, Any], **changes: Any) -> tuple[Path, dict[str, Any]]:
    folder, answer = runs.trained({"train.stages": list(stages), **changes})
    assert answer.get("error") is None, answer["error"]
    return folder, answer


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


SOFT, SELF = {"name": "soft", "epochs": 1}, {"name": "self", "teacher": "previous", "learning_rate": 2e-3}
AGAIN = {**SELF, "name": "again", "start": "fresh"}


@pytest.fixture(scope="module")
def generations(runs) -> tuple[Path, dict[str, Any]]:
    """The teacher's student, then that student's student."""
    return staged(runs, SOFT, AGAIN)


def test_a_training_of_one_stage_is_a_training_without_stages(runs):
    folder, _ = staged(runs, {"name": "only"})
    assert equal(student_weights(folder), student_weights(runs.whole))


def test_a_stage_goes_on_from_the_weights_of_the_one_before_with_settings_of_its_own(runs):
    second = {"learning_rate": 2e-3, "epochs": 3, "batch_size": 8, "schedule": "linear"}
    folder, _ = staged(runs, SOFT, {"name": "more", **second, "loss": {"alpha": 0.5}})
    start = {"init": "pretrained", "model": str(folder / "train/stages/1-soft/model")}
    changes = {"student": start, "train.seed": 1, "train.loss": {"alpha": 0.5}}
    plain, answer = runs.trained(changes | {f"train.{name}": value for name, value in second.items()})
    assert answer["error"] is None
    assert equal(student_weights(folder), student_weights(plain))
    first, _ = runs.trained({"train.epochs": 1})
    assert equal(weights(folder / "train/stages/1-soft/model"), student_weights(first))


def test_adapters_of_a_stage_begin_in_what_the_one_before_merged(runs):
    lora = {"lora": {"rank": 2}}
    folder, _ = staged(runs, SOFT, {"name": "more"}, student=SIZES | lora)
    start = {"init": "pretrained", "model": str(folder / "train/stages/1-soft/model"), **lora}
    plain, answer = runs.trained({"student": start, "train.seed": 1})
    assert answer["error"] is None
    assert equal(student_weights(folder), student_weights(plain))
    changes = {"student": SIZES | {"lora": {"merge": False}}, "train.stages": [SOFT, SELF]}
    _, answer = runs.trained(changes)
    assert "train.stages go on from whole models, and student.lora.merge: false saves adapters." in answer["error"]


def test_stages_take_their_features_from_one_cache(runs):
    def stages(source: str) -> list[dict[str, Any]]:
        features = [{"kind": "hidden_mse"}], [{"kind": "embeddings_mse"}]
        losses = [{"alpha": 0.5, "features": kinds, "features_from": source} for kinds in features]
        return [SOFT | {"loss": losses[0]}, {"name": "more", "epochs": 1, "loss": losses[1]}]

    changes = {"student.dropout": 0.0, "student.hidden_size": 8, "train.log_every": 1}
    folder = runs.start("teach")
    answer = runs.run(folder, "teach", "train", changes=changes | {"train.stages": stages("cache")})
    assert answer["error"] is None, answer["error"]
    manifest = read_manifest(LocalStore(str(folder)), "teacher/features")
    assert manifest is not None
    assert {f["name"].split(".")[0] for f in manifest.facts["features"]} == {"embeddings", "hidden"}
    beside, _ = staged(runs, *stages("teacher"), **changes)
    for name, part in (("1-soft", "hidden_mse"), ("2-more", "embeddings_mse")):
        found, expected = (
            [p[part] for p in points(place, "train", f"train/stages/{name}")] for place in (folder, beside)
        )
        assert found == pytest.approx(expected, rel=0.01)


def test_the_curves_of_every_stage_stand_in_its_folder(generations):
    folder, answer = generations
    for name, steps, rate in (("1-soft", 4, 1e-3), ("2-again", 8, 2e-3)):
        lines = (folder / f"train/stages/{name}/metrics.jsonl").read_text().splitlines()
        curve = [point for point in map(json.loads, lines) if point["group"] == "train"]
        assert curve[-1]["step"] == steps
        assert max(point["learning_rate"] for point in curve) <= rate
        assert list((folder / f"train/stages/{name}/tensorboard").iterdir())
    assert any(line.startswith("student, stage 2-again: validation kl") for line in answer["said"])
    manifest = read_manifest(LocalStore(str(folder)), "student")
    assert manifest is not None
    assert manifest.facts["stages_before"]["1-soft"]["steps"] == 4


def test_a_generation_learns_from_the_outputs_of_the_one_before(generations):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, _ = generations
    store, before = LocalStore(str(folder)), folder / "train/stages/1-soft/model"
    model, tokenizer = (kind.from_pretrained(before) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    data, cache = (read_manifest(store, name) for name in ("data", "train/stages/2-again/cache"))
    assert data is not None
    assert cache is not None
    assert [e.file for e in cache.files] == [e.file for s in ("train", "validation") for e in data.shards(s)]
    for shard, entry in zip(read_split(store, data.shards("train")), cache.shards("train"), strict=True):
        found = read_logits(store, "train/stages/2-again/cache", entry, cache)
        assert np.array_equal(found.row_ids_N, shard.row_ids_N)
        with torch.no_grad():
            inputs = tokenizer(shard.texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
            expected = model.eval()(**inputs).logits.numpy()
        step = (expected.max(axis=1) - expected.min(axis=1)) / 254  # of the int8 codec
        assert (np.abs(found.logits_NK - expected).max(axis=1) <= step + 1e-4).all()


def test_a_generation_is_what_a_run_with_that_teacher_makes(runs, generations):
    folder, _ = generations
    changes = {"teacher.model": str(folder / "train/stages/1-soft/model"), "train.seed": 1, "train.learning_rate": 2e-3}
    other = runs.start("teach")
    answer = runs.run(other, "teach", "train", changes=changes)
    assert answer["error"] is None
    assert equal(student_weights(other), student_weights(folder))
    assert points(folder, "validation", "train/stages/2-again") == points(other, "validation")


def test_a_stage_with_its_own_features_begins_where_it_is_its_own_teacher(runs):
    features = {"features": [{"kind": "hidden_mse"}], "alpha": 0.5}
    own = {**SELF, "loss": features, "learning_rate": 1e-3}
    folder, _ = staged(runs, SOFT, own, **{"student": {**SIZES, "dropout": 0.0}, "train.log_every": 1})
    first, last = (points(folder, "train", "train/stages/2-self")[place] for place in (0, -1))
    assert first["hidden_mse"] == pytest.approx(0, abs=1e-10)
    assert first["kl"] < 1e-3  # what int8 rounds
    assert last["hidden_mse"] > 1e-8
    assert not [name for name in student_weights(folder) if "projection" in name]


def test_the_control_has_the_stages_and_no_teacher_of_either_kind(runs, generations):
    changes = {"train.stages": [SOFT, AGAIN, {**SELF, "epochs": 1}]}
    folder = runs.start("train")
    answer = runs.run(folder, "train", "evaluate", changes=changes)
    assert answer["error"] is None, answer["error"]
    # Before its last fresh start nothing reaches a control, so that it begins there.
    assert sorted(path.name for path in (folder / "control/train/stages").iterdir()) == ["2-again", "3-self"]
    assert not list(folder.glob("control/**/cache"))
    alone = {"train.loss.alpha": 0.0, "train.metric": "nll", "train.learning_rate": 2e-3}
    second, _ = runs.trained({**alone, "train.seed": 1})
    assert equal(weights(folder / "control/train/stages/2-again/model"), student_weights(second))
    start = {"init": "pretrained", "model": str(folder / "control/train/stages/2-again/model")}
    third, _ = runs.trained({**alone, "student": start, "train.seed": 2, "train.epochs": 1})
    assert equal(weights(folder / "control/model"), student_weights(third))
    assert verify(Run(LocalStore(str(folder))))[1] == []


@pytest.mark.parametrize(
    "operation",
    [
        "rename plan.json", "rename step-00000003", "rename model", "rename train-00001.parquet",
        "rename validation-00000.json", "rename MANIFEST.json", "rename step-00000006", "rename student",
    ],
)  # fmt: skip
def test_a_training_killed_in_any_stage_goes_on_to_the_same_student(runs, generations, operation: str):
    whole, answer = generations
    changes = {"train.stages": [SOFT, AGAIN]}
    assert operation in answer["operations"], sorted(set(answer["operations"]))
    folder, killed = runs.trained(changes, fault=f"{answer['operations'].index(operation) + 1}:kill")
    assert killed == {"exit": -9}
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("train/stages/*/cache/*.json")}
    again = runs.run(folder, "train", changes=changes)
    assert again["error"] is None
    assert {path: path.stat().st_mtime_ns for path in kept if path.name != "MANIFEST.json"} == {
        path: time for path, time in kept.items() if path.name != "MANIFEST.json"
    }
    for place in ("student", "train/stages/1-soft/model"):
        assert equal(weights(folder / place), weights(whole / place))
    for stage in ("1-soft", "2-again"):
        assert points(folder, "validation", f"train/stages/{stage}") == points(
            whole, "validation", f"train/stages/{stage}"
        )


def test_what_is_under_way_and_what_another_setting_would_change_are_named_by_stage(runs, generations):
    _, answer = generations
    changes = {"train.stages": [SOFT, AGAIN]}
    number = len(answer["operations"]) - answer["operations"][::-1].index("rename step-00000006")
    folder, killed = runs.trained(changes, fault=f"{number + 2}:kill")
    assert killed == {"exit": -9}
    run = find_run(str(folder))
    config = Config.model_validate({**BASE, "train": {"stages": [SOFT, AGAIN]}})
    (student,) = [standing for standing in standings(run, config) if standing.part == "student"]
    assert (student.state, student.detail) == ("under way", "newest checkpoint of stage 2-again at step 6")
    refused = runs.run(folder, "train", changes={"train.stages": [SOFT, {**AGAIN, "learning_rate": 3e-3}]})
    assert "train.stages.2-again.learning_rate: was made with 0.002, now asked for 0.003." in refused["error"]


BASE = {"name": "x", "data": {"train": "a", "test": "b"}, "teacher": {"model": "m"}}


def test_a_plan_counts_the_steps_of_stages_and_the_forwards_of_a_student_that_teaches():
    features = {"features": [{"kind": "hidden_mse"}]}
    stages = [{**SOFT, "loss": features}, {**AGAIN, "epochs": 3, "batch_size": 50, "loss": features}]
    config = Config.model_validate({**BASE, "train": {"stages": stages, "batch_size": 20}})
    found = cost(config, {"train": 100, "validation": 10, "test": 10}, 7)
    assert found.steps == {"student": 5 + 6, "control": 6}  # nothing of the first stage reaches the control
    assert found.teacher_forwards == 110
    assert found.student_forwards == 110 + 300
    assert found.student_cache_bytes == 110 * 7 * 2
    assert any("410 rows at most" in line for line in found.lines())
    plain = cost(Config.model_validate(BASE), {"train": 100, "validation": 10, "test": 10}, 7)
    assert plain.steps == {"student": 40, "control": 40}
    assert not any("later stages" in line for line in plain.lines())


def test_a_stage_takes_what_it_leaves_out_from_train_and_a_loss_as_a_whole():
    train = {"learning_rate": 0.01, "patience": 3, "loss": {"alpha": 0.3, "temperature": 2.0}, "seed": 2**32 - 1}
    stages = [{"name": "a"}, {"name": "b", "patience": 1, "loss": {"alpha": 0.5}}, {"name": "c", "seed": 7}]
    config = Config.model_validate({**BASE, "train": {**train, "stages": stages}})
    a, b, c = (stage.settings for stage in training_stages("student", config))
    assert a == config.train.model_copy(update={"stages": None})
    assert (b.learning_rate, b.patience, b.loss.alpha, b.loss.temperature, b.seed) == (0.01, 1, 0.5, 4.0, 0)
    assert (c.patience, c.loss, c.seed) == (3, config.train.loss, 7)


def test_a_stage_can_set_what_a_training_can_but_what_is_of_the_training_as_a_whole():
    def is_speed(field: Any) -> bool:
        return (field.json_schema_extra or {}).get("speed", False)

    whole = {name for name, field in Train.model_fields.items() if is_speed(field)} | {"precision", "stages", "exclude"}
    assert set(Stage.model_fields) - {"name", "teacher", "start"} == set(Train.model_fields) - whole


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "train: stages is an empty list. Leave it out, or name a stage"),
        ([SOFT, None], "train.stages.1: found nothing; it should be a section of settings"),
        ([SOFT, SELF, SOFT], "train: stages[2] (soft): stages[0] has that name too. Give it another"),
        ([SELF], "train: stages[0] (self): teacher: previous, and no stage comes before. Leave it out"),
        ([{**SOFT, "start": "previous"}], "stages[0] (soft): start: previous, and no stage comes before"),
        ([SOFT, {**SELF, "loss": {"features": [{"kind": "hidden_mse"}], "features_from": "cache"}}],
         "stages[1] (self): teacher: previous, and the cache holds the first teacher's features."),
        ([SOFT, {"name": "b", "start": "fresh"}], "stages[1] (b): start: fresh with the teacher leaves nothing of"),
        ([SOFT, {**SELF, "loss": {"alpha": 0}}], "stages[1] (self): teacher: previous, and its loss, with alpha 0,"),
        ([{"epochs": 2}], "train.stages.0.name: is missing. Add it"),
        ([{"name": "../x"}], "train.stages.0.name: found '../x' (text); a stage's name is a plain name of"),
        ([{**SOFT, "epochs": 0}], "train.stages.0.epochs: found 0 (number); it should be greater than or equal to 1"),
        ([{**SOFT, "epoch": 2}], "train.stages.0.epoch: unknown setting. Did you mean epochs?"),
        ([{**SOFT, "workers": 2}], "train.stages.0.workers: unknown setting."),
        ([{**SOFT, "loss": {"alpha": 2}}], "train.stages.0.loss.alpha: found 2 (number)"),
        ([{**SOFT, "loss": {"features": [{"kind": "hidden_mse", "layers": [[0, 9]]}]}}],
         "train.stages[0].loss.features[0]: hidden_mse: layer map: the teacher has no layer 9"),
        ([SOFT, {**SELF, "loss": {"features": [{"kind": "hidden_mse", "layers": [[0, 2]]}]}}],
         "train.stages[1].loss.features[0]: hidden_mse: layer map: the teacher has no layer 2"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be_are_refused_before_anything_is_written(runs, stages: list[Any], message: str):
    folder, answer = runs.trained({"train.stages": stages})
    assert message in answer["error"]
    assert not (folder / "train").exists()


def test_a_batch_that_its_workers_do_not_fit_is_refused_by_stage():
    with pytest.raises(ValueError, match=r"stages\[0\] \(soft\): batch_size 2 is global and must be at least workers"):
        Config.model_validate({**BASE, "train": {"workers": 3, "stages": [{**SOFT, "batch_size": 2}]}})
