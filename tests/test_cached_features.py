"""Feature targets from the cache in real runs: the same numbers as the teacher beside the training, made once, kept.

The runs are the real stages without Ray (`small_runs.py`): a teacher of 2 layers, width 16 and 2 heads, 55 train rows
in 4 shards and 5 validation rows.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_files import equal, points, student_weights
from small_runs import SmallRuns, results

from raydistill.config.file import load_config
from raydistill.config.loss import Loss
from raydistill.config.section import identity
from raydistill.config.teacher import Teacher
from raydistill.data.feature_targets import cached_features
from raydistill.data.loader import Split
from raydistill.data.tokens import load_tokenizer
from raydistill.losses.cached_features import names_of_term
from raydistill.losses.feature_objective import FeatureTerm
from raydistill.models.configuration import Shape
from raydistill.models.loading import load_classifier
from raydistill.record.commit import read_manifest
from raydistill.record.run import Run, find_run, verify
from raydistill.record.store import LocalStore
from raydistill.stages import pipeline
from raydistill.stages.feature_cost import cost_of
from raydistill.stages.progress import Progress
from raydistill.stages.status import next_stage, standings
from raydistill.taught import FeatureTeacher

pytestmark = pytest.mark.xdist_group("small_runs")
FEATURES = [
    {"kind": "hidden_mse"}, {"kind": "attention_kl"}, {"kind": "value_relation", "relation_heads": 4},
    {"kind": "rkd_distance", "weight": 10.0}, {"kind": "embeddings_cosine"},
]  # fmt: skip
NAMES = ["attention.0", "attention.1", "embeddings", "hidden.0", "hidden.1", "pooled.1", "values.1"]
CACHED = {
    "train.loss.features": FEATURES, "train.loss.features_from": "cache", "student.dropout": 0.0, "train.log_every": 1,
    "train.seed": 5,
}  # fmt: skip
BESIDE = {**CACHED, "train.loss.features_from": "teacher"}
# Half a unit in the last place, relative to the value: float16 has 11 bits, bfloat16 8.
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
TRAIN_SHARDS = [f"train-{number:05d}.parquet" for number in range(4)]


def taught(runs: SmallRuns, changes: dict[str, Any] = CACHED, start: str = "train") -> Path:
    """A run in which teach has made the features; with start "train" the logits stood there before."""
    folder = runs.start(start)
    answer = runs.run(folder, "teach", changes=changes)
    assert answer["error"] is None, answer["error"]
    return folder


def copied(runs: SmallRuns, folder: Path, name: str) -> Path:
    """The run as teach left it, to be gone on with."""
    shutil.copytree(folder, runs.folder / name)
    return runs.folder / name


def trained(runs: SmallRuns, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    answer = runs.run(folder, "train", changes=changes)
    assert answer["error"] is None, answer["error"]
    return answer


def terms() -> tuple[FeatureTerm, ...]:
    """What FEATURES asks for, by hand."""
    return (
        FeatureTerm("hidden_mse", 1.0, ((0, 0), (1, 1))), FeatureTerm("attention_kl", 1.0, ((0, 0), (1, 1))),
        FeatureTerm("value_relation", 1.0, ((1, 1),), 4), FeatureTerm("rkd_distance", 10.0, ((1, 1),)),
        FeatureTerm("embeddings_cosine", 1.0, ((0, 0),)),
    )  # fmt: skip


def split_of(folder: Path) -> Split:
    store = LocalStore(str(folder))
    data, cache = read_manifest(store, "data"), read_manifest(store, "teacher/cache")
    assert data is not None
    tokenizer = load_tokenizer(Path(json.loads((folder / "tokenizer.json").read_text())), "teacher.model")
    features = cached_features(store, terms())
    return Split(store, "train", data, cache, tokenizer=tokenizer, max_length=48, features=features)


@pytest.fixture(scope="module")
def made(runs: SmallRuns) -> dict[str, Path]:
    """Runs whose features were made beside the logits, with each codec."""
    folders = {}
    for codec in ROUNDING:
        changes = CACHED if codec == "float16" else {**CACHED, "teacher.features_codec": codec}
        folders[codec] = taught(runs, changes, "teach")
        (folders[codec] / "tokenizer.json").write_text(json.dumps(str(runs.input / "teacher")))
    return folders


@pytest.mark.parametrize("codec", ROUNDING)
def test_a_batch_carries_what_the_teacher_computes_rounded_once(runs, made, codec: str):
    teacher = FeatureTeacher(load_classifier("t", runs.input / "teacher"), terms(), device=torch.device("cpu"))
    split = split_of(made[codec])
    for _, micro_batches in split.training_steps(
        seed=0, epoch=0, batch_size=9, first_step=0, rank=0, world=1, accumulation=2
    ):
        for batch in micro_batches():
            assert batch.teacher is not None
            expected = teacher.features(batch.inputs)
            mask = batch.inputs["attention_mask"].bool()
            assert [len(found) for found in batch.teacher.features] == [len(wanted) for wanted in expected]
            for term, found, wanted in zip(terms(), batch.teacher.features, expected, strict=True):
                real = {"attention": mask[:, None, :, None] & mask[:, None, None, :], "pooled": torch.tensor(True)}
                for ours, theirs in zip(found, wanted, strict=True):
                    assert ours.dtype == getattr(torch, codec)
                    inside = real.get(term.definition.what, mask[..., None]).expand(theirs.shape)
                    error = (ours.float() - theirs).abs()[inside]
                    # The teacher's own sums differ in their last bits with the rows beside them.
                    assert (error <= theirs.abs()[inside] * ROUNDING[codec] + 2e-6).all()
                    assert (ours[~inside] == 0).all()
    split.close()


@pytest.mark.parametrize("codec", ROUNDING)
def test_losses_are_those_of_the_teacher_beside_the_training(runs, made, codec: str):
    changes = {} if codec == "float16" else {"teacher.features_codec": codec}
    folder = copied(runs, made[codec], f"trained-{codec}")
    trained(runs, folder, {**CACHED, **changes})
    beside, _ = runs.trained(BESIDE)
    found, expected = points(folder, "train"), points(beside, "train")
    assert len(found) == len(expected) == 8
    # At the first step the student is the same. A square of a difference as large as its sides changes by at most
    # twice the rounding, a cosine by the rounding, a divergence of probabilities by the rounding of their sum.
    ours, theirs, rounding = found[0], expected[0], ROUNDING[codec]
    assert ours["kl"] == theirs["kl"]
    assert ours["hidden_mse"] == pytest.approx(theirs["hidden_mse"], rel=2 * rounding)
    assert ours["embeddings_cosine"] == pytest.approx(theirs["embeddings_cosine"], abs=rounding)
    assert ours["attention_kl"] == pytest.approx(theirs["attention_kl"], abs=rounding)
    assert ours["value_relation"] == pytest.approx(theirs["value_relation"], rel=4 * rounding, abs=1e-9)
    assert ours["rkd_distance"] == pytest.approx(theirs["rkd_distance"], rel=8 * rounding)
    assert theirs["hidden_mse"] > 1, "teacher and student are too much alike to compare"
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["hidden_mse"] == pytest.approx(theirs["hidden_mse"], rel=8 * rounding)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=16 * rounding)


def test_one_forward_makes_logits_and_features(runs, made):
    folder = runs.start("teach")
    answer = runs.run(folder, "teach", changes=CACHED)
    assert sorted(answer["scored"]) == [*TRAIN_SHARDS, "validation-00000.parquet"]
    cache = {name: data for name, data in results(folder).items() if name.startswith("teacher/cache/")}
    assert cache == {name: data for name, data in runs.expected.items() if name.startswith("teacher/cache/")}
    facts = json.loads((folder / "teacher/features/MANIFEST.json").read_text())["facts"]
    assert (facts["codec"], facts["rows"]) == ("float16", 55)
    assert [feature["name"] for feature in facts["features"]] == NAMES
    assert sorted(p.name for p in (folder / "teacher/features").glob("*.parquet")) == TRAIN_SHARDS
    assert verify(Run(LocalStore(str(folder))))[1] == []


def test_where_the_logits_stand_features_alone_are_made(runs, made):
    folder = runs.start("train")
    before = {p.name: p.stat().st_mtime_ns for p in (folder / "teacher/cache").iterdir()}
    answer = runs.run(folder, "teach", changes=CACHED)
    assert answer["error"] is None
    assert sorted(answer["scored"]) == TRAIN_SHARDS
    assert {p.name: p.stat().st_mtime_ns for p in (folder / "teacher/cache").iterdir()} == before
    assert features_of(folder) == features_of(made["float16"])
    again = runs.run(folder, "teach", changes=CACHED)
    assert (again["error"], again["scored"]) == (None, [])


def features_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in results(folder).items() if name.startswith("teacher/features/")}


def test_teach_killed_anywhere_goes_on_to_the_same_bytes(runs, made):
    folder = runs.start("teach")
    operations = runs.run(folder, "teach", changes=CACHED)["operations"]
    expected = {name: data for name, data in results(folder).items() if name.startswith("teacher/")}
    shutil.rmtree(folder)
    for number in range(1, len(operations) + 1, 4):
        folder = runs.start("teach")
        assert runs.run(folder, "teach", changes=CACHED, fault=f"{number}:kill") == {"exit": -9}
        answer = runs.run(folder, "teach", changes=CACHED)
        assert answer["error"] is None, (operations[number - 1], answer["error"])
        found = {name: data for name, data in results(folder).items() if name.startswith("teacher/")}
        assert found == expected, operations[number - 1]
        shutil.rmtree(folder)


def test_a_training_from_cached_features_goes_on_after_a_kill_to_the_same_weights(runs):
    changes = {**CACHED, "student.hidden_size": 8, "train.loss.features": [{"kind": "hidden_mse"}]}
    whole = taught(runs, changes)
    copy = copied(runs, whole, "killed")
    operations = trained(runs, whole, changes)["operations"]
    number = len(operations) - operations[::-1].index("rename step-00000006")
    assert runs.run(copy, "train", changes=changes, fault=f"{number}:kill") == {"exit": -9}
    again = trained(runs, copy, changes)
    assert next(post["going_on_from"] for post in again["posts"] if "going_on_from" in post) == 4
    assert equal(student_weights(copy), student_weights(whole))


def test_micro_batches_change_no_loss(runs, made):
    # Batches of 16, 16, 16 and 7 rows in micro-batches of 6, 5, 5 and 3, 2, 2. RKD is of a micro-batch's rows.
    changes = {**CACHED, "train.loss.features": [f for f in FEATURES if f["kind"] != "rkd_distance"]}
    curves = []
    for accumulation in (1, 3):
        folder = copied(runs, made["float16"], f"micro-{accumulation}")
        trained(runs, folder, {**changes, "train.accumulation": accumulation})
        curves.append(points(folder, "train"))
    for one, other in zip(*curves, strict=True):
        for name in ("loss", "hidden_mse", "attention_kl", "value_relation", "embeddings_cosine"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6)


def test_ranks_get_the_features_of_their_rows(made):
    split = split_of(made["float16"])

    def steps(rank: int, world: int, accumulation: int) -> list[list[Any]]:
        return [
            list(micro_batches())
            for _, micro_batches in split.training_steps(
                seed=0, epoch=0, batch_size=9, first_step=0, rank=rank, world=world, accumulation=accumulation
            )
        ]

    whole, parts = steps(0, 1, 1), [steps(rank, 3, 2) for rank in range(3)]
    for number, (expected,) in enumerate(whole):
        batches = [batch for part in parts for batch in part[number] if batch.rows]
        assert sum(batch.rows for batch in batches) == expected.rows
        first = 0
        for batch in batches:
            longest = batch.inputs["input_ids"].shape[1]
            for ours, theirs in zip(batch.teacher.features[0], expected.teacher.features[0], strict=True):
                assert torch.equal(ours, theirs[first : first + batch.rows, :longest])
            first += batch.rows
    split.close()


def test_a_damaged_shard_is_found_set_aside_and_made_again(runs, made):
    folder = copied(runs, made["float16"], "damaged")
    expected = features_of(folder)
    (folder / "config.yaml").write_text("")
    shard = folder / "teacher/features/train-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    answer = runs.run(folder, "train", changes=CACHED)
    assert "teacher/features/train-00002.parquet: has sha256" in answer["error"]
    assert [f.file for f in verify(find_run(str(folder)), repair=True)[1]] == ["teacher/features/train-00002.parquet"]
    answer = runs.run(folder, "teach", changes=CACHED)
    assert (answer["error"], answer["scored"]) == (None, ["train-00002.parquet"])
    assert features_of(folder) == expected


def test_features_are_lent_and_more_than_is_needed_serves(runs, made):
    lent = {"teacher.cache_from": str(made["float16"]), **CACHED}
    folders = [runs.folder / "borrower", runs.folder / "borrower-of-fewer"]
    for folder, features in zip(folders, (FEATURES, FEATURES[1:3]), strict=True):
        answer = runs.run(folder, "teach", "train", changes={**lent, "train.loss.features": features})
        assert (answer["error"], answer["scored"]) == (None, [])
        assert not (folder / "teacher").exists()
        plan = json.loads((folder / "train/plan.json").read_text())["inputs"]
        lender = json.loads((made["float16"] / "teacher/features/plan.json").read_text())
        assert plan["features"] == lender["fingerprint"]
    own = taught(runs, CACHED)
    trained(runs, own, CACHED)
    assert equal(student_weights(folders[0]), student_weights(own))


@pytest.mark.parametrize(
    ("lender", "features", "message"),
    [
        (None, FEATURES, "teacher/features: is not there, and train.loss.features needs attention.0, attention.1,"),
        (
            "float16", [{"kind": "key_relation"}, {"kind": "hidden_mse"}],
            "needs keys.1 too. Move that folder away and run raydistill teach with that run's config",
        ),
    ],
)  # fmt: skip
def test_a_lender_without_what_is_needed_is_refused_by_name(runs, made, lender, features, message: str):
    source = made[lender] if lender else runs.whole
    folder = runs.folder / f"refused-{lender}"
    changes = {**CACHED, "teacher.cache_from": str(source), "train.loss.features": features}
    answer = runs.run(folder, "teach", "train", changes=changes)
    assert message in answer["error"]
    assert not (folder / "train").exists()


def test_other_features_than_those_that_stand_are_refused_until_they_are_moved_away(runs):
    few = {**CACHED, "train.loss.features": [{"kind": "hidden_mse"}]}
    folder = taught(runs, few)
    wanted = {**CACHED, "train.loss.features": [{"kind": "hidden_mse"}, {"kind": "query_relation"}]}
    answer = runs.run(folder, "teach", changes=wanted)
    assert "holds hidden.0, hidden.1, train.loss.features needs queries.1 too. Move that folder away" in answer["error"]
    other = runs.run(folder, "teach", changes={**few, "teacher.features_codec": "bfloat16"})
    assert "teacher.features_codec: was made with float16, now asked for bfloat16" in other["error"]
    (folder / "teacher/features").rename(folder / "teacher/features.old")
    answer = runs.run(folder, "teach", changes=wanted)
    assert (answer["error"], sorted(answer["scored"])) == (None, TRAIN_SHARDS)
    redone = runs.run(folder, "teach", changes=CACHED, redo="teach")
    assert redone["error"] is None
    assert (folder / "teacher/features.1").exists()


def test_training_without_the_features_says_which_stage_makes_them(runs):
    _, answer = runs.trained(CACHED)
    assert "teacher/features: is not complete. Run `raydistill teach` with its config first" in answer["error"]


def test_status_asks_for_features_where_they_are_wanted(runs, made):
    plain, wanted = (load_config(folder / "config.yaml") for folder in (runs.whole, made["float16"]))
    run = Run(LocalStore(str(runs.start("train"))))
    assert next_stage(standings(run, plain)) == "train"
    assert next_stage(standings(run, wanted)) == "teach"
    found = standings(Run(LocalStore(str(made["float16"]))), wanted)
    assert next_stage(found) == "train"
    assert next(s.detail for s in found if s.part == "features") == "55 rows in 4 shards"


def test_plan_prints_both_costs_and_recommends_one(made):
    config = load_config(made["float16"] / "config.yaml")
    cost = pipeline.plan(config, Progress(lambda line: None))
    assert cost.features is not None
    manifest = read_manifest(LocalStore(str(made["float16"])), "teacher/features")
    assert manifest is not None
    # The sample holds the 5 validation rows too, and files have row ids and footers.
    assert cost.features.cache_bytes == pytest.approx(sum(entry.size for entry in manifest.files), rel=0.1)
    assert (cost.features.forwards, cost.features.logits_stand) == (2 * 55, True)
    lines = "\n".join(cost.lines())
    assert "made by 55 forwards more" in lines
    assert "features from the teacher: 110 forwards at most, beside the training" in lines
    assert f"recommended: train.loss.features_from={cost.features.recommended}: " in lines
    plain = config.model_copy(update={"train": config.train.model_copy(update={"loss": Loss()})})
    assert "features" not in "\n".join(pipeline.plan(plain, Progress(lambda line: None)).lines())


def test_the_cost_of_features_by_hand():
    names = ("attention.0", "hidden.1", "pooled.1")
    # Rows of 3 and 5 tokens: 2 x 3^2 + 3 x 16 + 16 and 2 x 5^2 + 5 x 16 + 16 numbers of two bytes, 164 and 292 bytes.
    cost = cost_of(names, Shape("bert", 2, 2, 16), np.array([3, 5]), rows=10, epochs=4, logits_stand=False)
    assert (cost.cache_bytes, cost.forwards) == (2280, 40)
    assert cost.read_seconds == pytest.approx(4 * 2280 / 200e6)
    assert cost.forward_seconds == pytest.approx(40 * 4 * 2 * (2 * 12 * 16 * 16) / 5e10)
    assert cost.recommended == "teacher"
    assert cost_of(names, Shape("bert", 6, 12, 384), np.array([15]), rows=10, epochs=4, logits_stand=False).lines() == [
        "features from the cache: about 177 kB, 17.7 kB a row, made by the forwards that make the logits",
        "features from the teacher: 40 forwards at most, beside the training",
        "recommended: train.loss.features_from=cache: about 0 s of reading at 200 MB/s against 0 s of forwards on two"
        " CPU threads; on a GPU the teacher, where its forward takes less than 88 µs a row",
    ]


def test_maps_of_another_number_of_heads_are_kept_as_their_mean(runs, made):
    changes = {**CACHED, "student.num_heads": 4, "train.loss.features": [{"kind": "attention_mse"}]}
    folder = taught(runs, changes)
    trained(runs, folder, changes)
    facts = json.loads((folder / "teacher/features/MANIFEST.json").read_text())["facts"]
    assert facts["features"] == [{"axes": "ALL", "name": f"attention_mean.{layer}", "size": 1} for layer in (0, 1)]
    beside, _ = runs.trained({**changes, "train.loss.features_from": "teacher"})
    # Maps that are kept whole serve as well.
    borrower = runs.folder / "borrower-of-maps"
    lent = {**changes, "teacher.cache_from": str(made["float16"])}
    answer = runs.run(borrower, "teach", "train", changes=lent)
    assert (answer["error"], answer["scored"]) == (None, [])
    for run in (folder, borrower):
        for ours, theirs in zip(points(run, "train"), points(beside, "train"), strict=True):
            assert ours["attention_mse"] == pytest.approx(theirs["attention_mse"], rel=0.01, abs=1e-7)


def test_unlabelled_rows_have_features_too(runs):
    texts = (runs.input / "test.csv").read_text().splitlines()
    (runs.folder / "unlabelled.csv").write_text("\n".join(texts))
    changes = {**CACHED, "data.unlabelled": str(runs.folder / "unlabelled.csv")}
    folder = runs.start("prepare")
    answer = runs.run(folder, "prepare", "teach", "train", changes=changes)
    assert answer["error"] is None, answer["error"]
    kept = sorted(path.name for path in (folder / "teacher/features").glob("*.parquet"))
    assert kept == [*TRAIN_SHARDS, "unlabelled-00000.parquet", "unlabelled-00001.parquet"]
    assert all(point["hidden_mse"] > 0 for point in points(folder, "train"))


def test_names_say_what_is_kept():
    assert [names_of_term(term) for term in terms()] == [
        ("hidden.0", "hidden.1"), ("attention.0", "attention.1"), ("values.1",), ("pooled.1",), ("embeddings",),
    ]  # fmt: skip


def test_the_setting_changes_a_fingerprint_only_where_it_is_used():
    assert "features_from" not in identity(Loss())
    assert "features_codec" not in identity(Teacher(model="t"))
    used = Loss.model_validate({"features": [{"kind": "hidden_mse"}], "features_from": "cache"})
    assert identity(used)["features_from"] == "cache"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.loss.features_from": "cache"}, "features_from: cache means nothing without features; remove it"),
        (
            {"teacher.features_codec": "bfloat16"},
            "teacher.features_codec means nothing without train.loss.features_from=cache; remove it",
        ),
        ({"train.loss.features_from": "disk"}, "train.loss.features_from"),
    ],
)
def test_settings_that_mean_nothing_are_refused(runs, changes, message: str):
    _, answer = runs.trained(changes)
    assert message in answer["error"]
