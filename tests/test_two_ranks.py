"""Trainings of two ranks against the same of one: the curves must not tell them apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import points, student_weights

pytestmark = pytest.mark.xdist_group("small_runs")
# Without dropout, which each rank draws for itself. An epoch's last batch of 54 - 48 = 6 rows is uneven over 4 parts.
STEADY = {"student.dropout": 0.0, "train.log_every": 1}
FEATURES = [
    {"kind": "hidden_mse"}, {"kind": "hidden_cosine", "layers": "final"}, {"kind": "embeddings_mse"},
    {"kind": "attention_kl"}, {"kind": "value_relation", "relation_heads": 4},
]  # fmt: skip
PRETRAINED = {
    "student.init": "pretrained", "student.hidden_size": None, "student.num_layers": None, "student.num_heads": None,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "features of a narrower student": {"train.loss.features": FEATURES, "student.hidden_size": 8},
    "features of a pretrained student": {"train.loss.features": FEATURES, **PRETRAINED},
    "a pretrained student": PRETRAINED,
    "adapters": {"student.lora": {"rank": 4}, "train.loss.features": FEATURES[:1]},
    "thawing under ZeRO-2": {
        "train.loss.features": FEATURES[:1],
        "student.hidden_size": 8,
        "train.unfreeze": 0.5,
        "train.deepspeed": {"zero_stage": 2},
    },
    "features under ZeRO-3": {"train.loss.features": FEATURES, "train.deepspeed": {"zero_stage": 3}},
}


def settings(runs: Any, case: str) -> dict[str, Any]:
    changes = {**STEADY, **CASES[case]}
    return changes | ({"student.model": str(runs.input / "teacher")} if "student.init" in changes else {})


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_curves_of_one(runs, case: str):
    one, answer = runs.trained(settings(runs, case))
    assert answer["error"] is None
    two, answer = runs.trained({**settings(runs, case), "train.workers": 2, "train.accumulation": 2})
    assert answer["error"] is None
    assert_same_curves(one, two)
    ours, theirs = student_weights(two), student_weights(one)
    for name, value in theirs.items():
        if not name.endswith("key.bias"):  # softmax cannot see it, and Adam blows up what rounding leaves
            torch.testing.assert_close(torch.from_numpy(ours[name]), torch.from_numpy(value), rtol=1e-3, atol=2e-4)


def assert_same_curves(one: Path, two: Path) -> None:
    for group in ("train", "validation"):
        expected, found = points(one, group), points(two, group)
        assert [point["step"] for point in found] == [point["step"] for point in expected]
        for theirs, ours in zip(expected, found, strict=True):
            assert set(ours) == set(theirs)
            for name in set(theirs) - {"group", "rows_per_second"}:
                assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-6), (name, ours["step"])
