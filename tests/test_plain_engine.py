"""A training in one process without a process group and without DeepSpeed: the same numbers, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

# Dropout of 0.1, clipping, weight decay and schedule are the small run's own.
CASES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "two micro-batches": {"train.accumulation": 2},
    "bf16": {"train.precision": "bf16"},
    "features with a projection": {"train.loss.features": [{"kind": "hidden_mse"}], "student.hidden_size": 8},
    "layers that thaw one after the other": {"train.unfreeze": 0.6},
    "an adapter": {"student.lora": {"rank": 2}},
    "a narrow part of the teacher": {
        "student.init": "teacher_layers", "student.hidden_size": None, "student.num_layers": None,
        "student.num_heads": None, "student.layers": [1], "student.feed_forward": 8,
    },
}  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    places = [*folder.glob("train/checkpoints/step-*/*.safetensors"), *folder.glob("student/**/*.safetensors")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in places}


def curves(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "train/metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "rows_per_second"} for line in lines]


@pytest.mark.parametrize("case", CASES)
def test_one_process_alone_computes_what_deepspeed_computes(runs, case: str):
    changes = {**CASES[case], "train.log_every": 1}
    (grouped, first), (alone, second) = (runs.trained(changes, plain=plain) for plain in (False, True))
    assert first["error"] is None
    assert second["error"] is None
    assert curves(alone) == curves(grouped)
    assert files(alone) == files(grouped)
    assert len(files(alone)) >= 5


def test_one_process_alone_goes_on_after_a_kill_to_the_same_bytes(runs):
    whole, answer = runs.trained({}, plain=True)
    operations = answer["operations"]
    number = len(operations) - operations[::-1].index("rename step-00000006")
    folder, killed = runs.trained({}, plain=True, fault=f"{number}:kill")
    assert killed == {"exit": -9}
    again = runs.run(folder, "train", plain=True)
    assert again["error"] is None
    assert next(post["going_on_from"] for post in again["posts"] if "going_on_from" in post) == 4
    assert curves(folder) == curves(whole)
    assert files(folder)["student/model.safetensors"] == files(whole)["student/model.safetensors"]
