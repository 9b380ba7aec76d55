"""Fused trials against the ordinary loop: each member's losses, metrics and curves are those that it has alone."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydistill.config.file import validate
from raydistill.config.run import Config
from raydistill.stages.fusable import why_not_fused, why_not_together

BASE = {"train.log_every": 1, "train.epochs": 3, "train.loss.alpha": 0.5, "train.learning_rate": 3e-3}
MEMBERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {
        "train.loss.temperature": 8.0, "train.loss.alpha": 0.9, "train.learning_rate": 1e-3, "train.clip": 0.1,
        "train.warmup": 0.4, "train.schedule": "linear",
    },
    "cooling": {"train.loss.temperature_end": 1.0, "train.loss.alpha_end": 0.2, "train.weight_decay": 0.3},
    "reverse": {"train.loss.kind": "reverse_kl"},
    "labels": {"train.loss.alpha": 0.0, "train.loss.label_smoothing": 0.1},
    "other rows": {"train.seed": 1},
    "other rows, hot": {"train.seed": 1, "train.loss.temperature": 8.0, "train.loss.hard_targets": "teacher"},
}  # fmt: skip
# Of a log-probability in float32, times the square of the temperature: the small run's teacher knows little, so that
# KL is not far from it.
ROUNDING = 2e-6
SPEED = ("rows_per_second",)


def curve(folder: Path) -> list[dict[str, Any]]:
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in p.items() if name not in SPEED} for p in points]


def settings(**members: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: BASE | changes for name, changes in members.items()}


@pytest.fixture(scope="module")
def alone(runs) -> dict[str, list[dict[str, Any]]]:
    """The curves of every member, trained by the ordinary loop."""
    found = {}
    for name, changes in MEMBERS.items():
        folder, answer = runs.trained(BASE | changes)
        assert answer["error"] is None
        found[name] = curve(folder / "train")
    return found


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [set(point) for point in found] == [set(point) for point in expected]
    for point, other in zip(found, expected, strict=True):
        for name, value in other.items():
            wanted = value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=ROUNDING)
            assert point[name] == wanted, (name, point)


def test_every_member_has_the_curves_that_it_has_alone(runs, alone):
    folder, answer = runs.fused(settings(**MEMBERS))
    assert answer["error"] is None
    for name, expected in alone.items():
        same(curve(folder / "tune/trials" / name), expected)
        validated = [point for point in expected if point["group"] == "validation"]
        assert len(answer["history"][name]) == len(validated) == 3
        for values, point in zip(answer["history"][name], validated, strict=True):
            assert values == pytest.approx({metric: point[metric] for metric in values}, rel=1e-4, abs=ROUNDING)


def test_who_is_dropped_costs_nothing_more_and_disturbs_no_one(runs, alone):
    drops = {"1": ["hot", "other rows"], "2": ["plain"]}
    folder, answer = runs.fused(settings(**MEMBERS), drops=drops)
    assert {name: len(found) for name, found in answer["history"].items()} == {
        name: 1 if name in drops["1"] else 2 if name in drops["2"] else 3 for name in MEMBERS
    }
    for name, expected in alone.items():
        found = curve(folder / "tune/trials" / name)
        same(found, expected[: len(found)])
    posted = [post["member"] for post in answer["posts"] if post.get("step") == 12 and "loss" in post]
    assert sorted(posted) == sorted(set(MEMBERS) - {"hot", "other rows", "plain"})


def test_a_member_whose_loss_is_not_finite_ends_alone(runs, alone):
    broken = {"train.loss.temperature": 1e-41}
    folder, answer = runs.fused(settings(plain={}, broken=broken))
    assert answer["failed"] == {
        "broken": "student training: the loss at step 1 is not finite. Lower train.learning_rate,"
        " or set train.precision=fp32"
    }
    assert answer["history"]["broken"] == []
    same(curve(folder / "tune/trials/plain"), alone["plain"])


def state(folder: Path) -> dict[str, bytes]:
    """What a group leaves behind, without wall-clock seconds and what a kill left half written."""
    found = {}
    for path in sorted((folder / "tune").rglob("*")):
        if ".tmp" in str(path):
            continue
        if path.name.endswith(".safetensors"):
            found[str(path.relative_to(folder))] = path.read_bytes()
        if path.name == "metrics.jsonl":
            found[str(path.relative_to(folder))] = json.dumps(curve(path.parent)).encode()
    return found


@pytest.mark.parametrize("place", ["a checkpoint is half written", "in mid-epoch", "after an epoch"])
def test_a_killed_group_goes_on_to_the_same_bytes(runs, place: str):
    members = settings(**{name: MEMBERS[name] for name in ("plain", "hot", "other rows")})
    drops = {"1": ["hot"]}
    whole, answer = runs.fused(members, drops=drops)
    operations = answer["operations"]
    commits = [n for n, o in enumerate(operations, 1) if o.startswith("rename") and "step-" in o]
    assert len(commits) > 3, operations
    number = {"a checkpoint is half written": commits[1], "in mid-epoch": commits[0] + 1, "after an epoch": commits[2]}
    folder, answer = runs.fused(members, drops=drops, fault=f"{number[place]}:kill")
    assert answer == {"exit": -9}
    _, answer = runs.fused(members, folder, drops=drops)
    assert answer["error"] is None
    assert state(folder) == state(whole)
    assert {name: len(found) for name, found in answer["history"].items()} == {"plain": 3, "hot": 1, "other rows": 3}


CONFIG: dict[str, Any] = {
    "name": "run", "data": {"train": "train.csv", "test": "test.csv"}, "teacher": {"model": "teacher"},
    "student": {"init": "config", "hidden_size": 16, "num_layers": 2, "num_heads": 2},
}  # fmt: skip


def changed(changes: dict[str, Any]) -> Config:
    tree = copy.deepcopy(CONFIG)
    for name, value in changes.items():
        *sections, key = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return validate(tree, {}, "test")


@pytest.mark.parametrize(
    ("change", "model_type", "reason"),
    [
        ("train.learning_rate=1e-3", "bert", None),
        ("train.loss.kind=dkd", "distilbert", None),
        ("train.learning_rate=1e-3", "deberta-v2", "student: a model of the type deberta-v2 cannot be stacked, only"),
        ("student.lora.rank=4", "bert", "student.lora: adapters cannot be stacked"),
        ("train.loss.features=[{kind: hidden_mse}]", "bert", "train.loss.features: losses on features cannot"),
        ("train.stages=[{name: one}]", "bert", r"train.stages: fused trials take it at its default \(absent\) alone"),
        ("train.accumulation=2", "bert", r"train.accumulation: fused trials take it at its default \(1\) alone"),
        ("train.workers=2", "bert", "train.workers: fused"),
        ("train.deepspeed.zero_stage=1", "bert", "train.deepspeed: fused"),
        ("train.validate_every=5", "bert", "train.validate_every: fused"),
        ("train.gradient_checkpointing=true", "bert", "train.gradient_checkpointing: fused"),
        ("train.precision=fp16", "bert", "train.precision: fp16 scales its loss"),
        ("data.max_length=513", "bert", "data.max_length: rows of more than 512 tokens"),
    ],
)
def test_what_cannot_be_fused_is_said_with_its_setting(change: str, model_type: str, reason: str | None):
    name, _, value = change.partition("=")
    found = why_not_fused(changed({name: yaml.safe_load(value)}), model_type)
    assert found is None if reason is None else re.match(reason, found or ""), found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"train.loss.temperature": 2.0, "train.seed": 3, "train.learning_rate": 1e-3, "train.clip": 2.0}, None),
        ({"train.batch_size": 16}, "train.batch_size: 16 differs from 32; fused trials share it"),
        ({"train.epochs": 3}, "train.epochs: 3 differs from 10; fused trials share it"),
        ({"student.num_layers": 1}, "student.num_layers: 1 differs from 2; fused trials share it"),
        ({"data.max_length": 32}, "data.max_length: 32 differs from 128; fused trials share it"),
    ],
)
def test_what_members_must_share_is_said_with_both_values(change: dict[str, Any], reason: str | None):
    assert why_not_together([changed({}), changed(change)]) == reason
