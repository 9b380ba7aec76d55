"""The training loop's own rules: schedule, validation, early stopping, which checkpoint is kept, what is not finite."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_files import checkpoint_weights, equal, facts, points, student_weights
from safetensors.numpy import load_file, save_file

STEPS = 8  # 54 train rows in batches of 16, 2 epochs


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_and_falls_as_the_schedule_says(runs, schedule: str):
    changes = {"train.schedule": schedule, "train.warmup": 0.25, "train.log_every": 1, "train.learning_rate": 0.01}
    folder, answer = runs.trained(changes)
    assert answer["error"] is None
    falls = {
        "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
        "linear": lambda done: 1 - done,
        "constant": lambda done: 1.0,
    }[schedule]
    expected = [0.005, 0.01] + [0.01 * falls(n / 6) for n in range(6)]
    assert [point["learning_rate"] for point in points(folder, "train")] == pytest.approx(expected)


def test_validation_every_n_steps_and_at_the_end(runs):
    folder, _ = runs.trained({"train.validate_every": 3})
    assert [point["step"] for point in points(folder, "validation")] == [3, 6, STEPS]


def test_training_stops_when_validation_no_longer_gains(runs):
    # A learning rate this small changes no prediction, so that accuracy never rises above its first value.
    changes = {"train.learning_rate": 1e-9, "train.metric": "accuracy", "train.epochs": 50, "train.patience": 3}
    folder, _ = runs.trained(changes)
    assert [point["step"] for point in points(folder, "validation")] == [4, 8, 12, 16]
    assert facts(folder)["steps"] == 16
    assert facts(folder)["step"] == 4


def test_the_best_or_the_last_checkpoint_is_kept_as_asked(runs):
    # A learning rate this small moves weights and changes no prediction: the first accuracy stays the best.
    changes = {"train.learning_rate": 1e-9, "train.metric": "accuracy", "train.validate_every": 1}
    found = {}
    for choose in ("best", "last"):
        folder, answer = runs.trained({**changes, "train.choose": choose})
        assert answer["error"] is None
        found[choose] = folder
        values = {point["step"]: point["accuracy"] for point in points(folder, "validation")}
        assert len(values) == STEPS
        step = 1 if choose == "best" else STEPS
        assert facts(folder)["step"] == step
        assert facts(folder)["value"] == pytest.approx(values[step])
        kept, weights = student_weights(folder), checkpoint_weights(folder, step)
        assert equal(kept, weights)
    assert not equal(student_weights(found["best"]), student_weights(found["last"]))


def test_a_loss_that_is_not_finite_names_its_step_and_a_way_out(runs):
    # Logits over such a temperature overflow; the points of the curve come every third step.
    folder, answer = runs.trained({"train.loss.temperature": 1e-41, "train.log_every": 3})
    expected = (
        "student training: the loss at step 1 is not finite. Lower train.learning_rate, or set train.precision=fp32"
    )
    assert answer["error"] == expected
    assert not (folder / "student").exists()


def test_a_teachers_output_that_is_not_finite_names_its_row(runs, tmp_path: Path):
    broken = tmp_path / "input"
    shutil.copytree(runs.input, broken)
    weights = load_file(broken / "teacher/model.safetensors")
    weights["classifier.bias"][2] = np.nan
    save_file(weights, broken / "teacher/model.safetensors", metadata={"format": "pt"})
    folder = runs.start("teach")
    answer = runs.run(folder, "teach", source=str(broken))
    assert (
        "teacher.model: its output for row 0 (shard train-00000.parquet) is not finite, like 15 more" in answer["error"]
    )
    assert not (folder / "teacher/cache/MANIFEST.json").exists()


def test_clipping_bounds_the_step_and_not_the_norm_that_is_reported(runs):
    plain, _ = runs.trained({"train.log_every": 1, "train.clip": 1e9})
    clipped, _ = runs.trained({"train.log_every": 1, "train.clip": 1e-9})
    first = [points(folder, "train")[0]["grad_norm"] for folder in (plain, clipped)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert first[0] > 0.01


# What each kind takes beside the temperature; the undisturbed run has forward_kl.
KINDS = {
    "reverse_kl": {}, "jsd": {"beta": 0.3}, "skew_forward_kl": {"skew": 0.2}, "skew_reverse_kl": {},
    "total_variation": {}, "logit_mse": {}, "dkd": {"non_target_weight": 4.0}, "dist": {"intra_weight": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_response_loss_trains_and_reports_its_part(runs, kind: str):
    settings = {"kind": kind, "standardise": True, "label_smoothing": 0.1, **KINDS[kind]}
    folder, answer = runs.trained({f"train.loss.{name}": value for name, value in settings.items()})
    assert answer["error"] is None
    curve = points(folder, "train")
    assert all(math.isfinite(point[kind]) and point[kind] >= 0 for point in curve)
    # The loss is what its parts say: alpha 0.9 of the one, 0.1 of the other.
    for point in curve:
        assert point["loss"] == pytest.approx(0.9 * point[kind] + 0.1 * point["cross_entropy"], rel=1e-5)
    assert not equal(student_weights(folder), student_weights(runs.whole))


def test_the_teachers_own_classes_as_hard_targets(runs):
    changes = {"train.loss.alpha": 0.0, "train.loss.hard_targets": "teacher"}
    taught, answer = runs.trained(changes)
    assert answer["error"] is None
    labelled, _ = runs.trained({"train.loss.alpha": 0.0})
    assert not equal(student_weights(taught), student_weights(labelled))


# The teacher has 2 layers of width 16 with 2 heads. Each case: the student's changes, the features, the parts' names.
FEATURES = {
    "hidden states of a narrower student": (
        {"hidden_size": 8}, [{"kind": "hidden_mse", "weight": 2.0}, {"kind": "hidden_cosine", "layers": [[0, 1]]}],
        ["hidden_mse", "hidden_cosine"],
    ),
    "embeddings and attention": (
        {"dropout": 0.0}, [{"kind": "embeddings_mse"}, {"kind": "attention_kl"}, {"kind": "attention_mse"}],
        ["embeddings_mse", "attention_kl", "attention_mse"],
    ),
    "relations": (
        {"hidden_size": 8},
        [{"kind": f"{name}_relation", "relation_heads": 4} for name in ("query", "key", "value")],
        ["query_relation", "key_relation", "value_relation"],
    ),
    "examples, and one kind twice": (
        {"dropout": 0.0},
        [
            {"kind": "rkd_distance", "weight": 500.0}, {"kind": "rkd_angle", "weight": 500.0},
            {"kind": "rkd_distance", "weight": 500.0, "layers": [[0, 0]]},
        ],
        ["rkd_distance", "rkd_angle", "rkd_distance_2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FEATURES)
def test_feature_losses_train_the_student_and_leave_no_trace_in_it(runs, case: str):
    student, features, names = FEATURES[case]
    changes = {"train.loss.features": features, "train.log_every": 1, "train.epochs": 25, "train.learning_rate": 3e-3}
    changes |= {f"student.{name}": value for name, value in student.items()}
    folder, answer = runs.trained(changes)
    assert answer["error"] is None
    curve = points(folder, "train")
    for name in names:
        # Near 0 the attention's KL may round to just below it: its inputs sum to 1 within float32 only.
        assert all(math.isfinite(point[name]) and point[name] > -1e-6 for point in curve)
        assert np.mean([p[name] for p in curve[-20:]]) < np.mean([p[name] for p in curve[:8]]), f"{name} does not fall"
    weights = dict(zip(names, (feature.get("weight", 1.0) for feature in features), strict=True))
    for point in curve:
        expected = 0.9 * point["kl"] + 0.1 * point["cross_entropy"] + sum(w * point[n] for n, w in weights.items())
        assert point["loss"] == pytest.approx(expected, rel=1e-5)
    assert not [name for name in student_weights(folder) if "projection" in name or name.startswith("student.")]


@pytest.mark.parametrize(
    "changes",
    [
        {"train.loss.features": [{"kind": "hidden_mse"}], "student.hidden_size": 8},
        {"train.group_by_length": True},
    ],
    ids=["projections", "rows grouped by length"],
)
def test_a_training_goes_on_after_a_kill_to_the_same_weights(runs, changes: dict[str, Any]):
    whole, folder = runs.killed_training(changes)
    assert equal(student_weights(folder), student_weights(whole))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": [{"kind": "attention_kl"}]}, "features[0]: attention_kl: the student's attention must be seen"),
        (
            {"features": [{"kind": "hidden_mse"}, {"kind": "hidden_mse", "layers": [[0, 2]]}]},
            "features[1]: hidden_mse: layer map: the teacher has no layer 2, it has 2, counted from 0 to 1",
        ),
        (
            {"features": [{"kind": "key_relation", "relation_heads": 3}]},
            "features[0]: key_relation: 3 relation heads do not divide the teacher's width 16",
        ),
    ],
)
def test_features_that_a_model_does_not_have_are_refused_before_anything_is_written(runs, changes, message: str):
    folder, answer = runs.trained({f"train.loss.{name}": value for name, value in changes.items()})
    assert f"train.loss.{message}" in answer["error"]
    assert not (folder / "train").exists()
