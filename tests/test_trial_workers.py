"""Trials of several workers: the same trials as of one, whatever stops them; and what of them a cluster holds."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import called, kill
from test_tune import RATES, SEARCH, curves, facts, on_ray, searched, table, trial_actors

from raydistill.config.file import validate
from raydistill.config.run import Config
from raydistill.errors import UserError
from raydistill.stages.cluster import Resources, Share, share_for_trials

pytestmark = [pytest.mark.xdist_group("small_runs")]

# Without dropout, which every rank draws for itself: then two workers reach what one reaches, but for rounding.
ONE = SEARCH | {"student.dropout": 0.0, "cluster.cpus": 2, "train.epochs": 2}
TWO = ONE | {"train.workers": 2, "train.deepspeed": {"zero_stage": 1}, "tune.fused": "auto"}
CLOSE = {"rel": 1e-4, "abs": 2e-6}


def same(folder: Path, expected: Path) -> None:
    """The same decisions and winner, and the same numbers but for rounding."""
    assert facts(folder)["winner"]["number"] == facts(expected)["winner"]["number"]
    for row, other in zip(table(folder), table(expected), strict=True):
        assert row == {k: pytest.approx(v, **CLOSE) if isinstance(v, float) else v for k, v in other.items()}


@pytest.fixture(scope="module")
def two(runs) -> tuple[Path, dict[str, Any]]:
    folder, answer = searched(runs, TWO)
    assert answer["error"] is None, answer["error"]
    return folder, answer


def test_trials_of_two_workers_come_out_as_those_of_one(runs, two: tuple[Path, dict[str, Any]]):
    one, answer = searched(runs, ONE)
    assert answer["error"] is None
    assert not list(two[0].glob("tune/groups/*"))
    assert sorted(len(curve) for curve in curves(two[0]).values()) == sorted(map(len, curves(one).values()))
    same(two[0], one)


@pytest.mark.parametrize("share", [0.6])
def test_a_killed_search_goes_on_to_the_same(runs, two: tuple[Path, dict[str, Any]], share: float):
    expected, answer = two
    folder, killed = searched(runs, TWO, fault=f"{int(share * len(answer['operations']))}:kill")
    assert killed == {"exit": -9}
    again = runs.run(folder, "tune", changes=TWO)
    assert again["error"] is None
    assert table(folder) == table(expected)
    assert curves(folder) == curves(expected)


def test_a_trial_that_fails_on_its_workers_is_a_row_with_its_reason(runs):
    space = {"train.loss.temperature": {"choice": [1e-41, 2.0]}}
    folder, answer = searched(runs, TWO | {"tune.space": space})
    assert answer["error"] is None
    first, second = table(folder)
    assert (first["status"], second["status"]) == ("failed", "finished")
    assert first["reason"].startswith("the loss at step 1 is not finite. Lower train.learning_rate")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"tune.fused": True}, "tune.fused: true, and trials of 2 workers are not fused. Set tune.workers=1, or"),
        ({"tune.workers": 3}, "tune.workers: found 3 for each trial, the cluster has 2 CPUs at 1 for each of a"),
        ({"tune.workers": 17}, "tune.workers: found 17, and a batch of 16 rows in 1 micro-batches for each is not"),
        ({"tune.max_concurrent": 2}, "tune.max_concurrent: found 2, the cluster has 2 CPUs at 1 for each of a trial's"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(runs, changes: dict[str, Any], part: str):
    folder, answer = searched(runs, TWO | changes)
    assert part in (answer["error"] or "")
    assert not (folder / "tune").exists()


def test_a_winner_of_two_workers_may_have_fused_trials_of_one(runs):
    folder, answer = searched(runs, TWO | {"tune.workers": 1})
    assert answer["error"] is None
    assert list(folder.glob("tune/groups/*"))


# A generation of one trial: each has its workers once, the second where the first one has given them back.
ON_RAY = TWO | {
    "tune.space": {"train.learning_rate": {"choice": RATES[1::-1]}}, "tune.generation": 1,
    "train.deepspeed": {"zero_stage": 3},
}  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("killed", ["nothing", "trial", "worker"])
def test_trials_on_ray_have_their_workers_and_leave_nothing(runs, killed: str):
    expected, answer = searched(runs, ON_RAY)
    assert answer["error"] is None
    folder, command = on_ray(runs, expected)
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    with open(folder.parent / f"{folder.name}.log", "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment)
        while killed != "nothing" and not list(folder.glob("tune/trials/*/checkpoints/latest.json")):
            assert process.poll() is None, "the search ended before the moment to disturb it"
            time.sleep(0.02)
        tree = psutil.Process(process.pid).children(recursive=True)
        workers = called(tree, "ray::RayTrainWorker")
        kill({"nothing": [], "trial": trial_actors(tree), "worker": workers[:1]}[killed])
        assert process.wait(1000) == 0, Path(log.name).read_text()
        log.seek(0)
        assert "starting up to 1 trial of 2 workers, 1 CPU each" in log.read()
    assert table(folder) == table(expected)
    assert curves(folder) == curves(expected)
    assert not list(folder.glob("tune/.ray"))


def config(train: dict[str, Any], tune: dict[str, Any]) -> Config:
    data = {"train": "a.csv", "test": "b.csv", "text": "text", "label": "label"}
    search = {"space": {"train.learning_rate": {"choice": RATES}}, "search": "grid", **tune}
    settings = {"name": "run", "data": data, "teacher": {"model": "t"}, "train": train, "tune": search}
    return validate(settings, {}, "a test")


CPUS = Resources(cpus=8, gpus=0, node_cpus=4, trial_drivers=100, nodes=((4, 0), (4, 0)))
GPUS = Resources(cpus=64, gpus=8, node_cpus=32, trial_drivers=100, nodes=((32, 4), (32, 4)))
NO_DRIVERS = replace(CPUS, trial_drivers=0)


@pytest.mark.parametrize(
    ("resources", "train", "tune", "share"),
    [
        (CPUS, {}, {}, Share(8, 1, 0, 1)),
        (CPUS, {"cpus_per_worker": 3}, {}, Share(2, 3, 0, 1)),  # one on each node
        (CPUS, {"workers": 2}, {}, Share(4, 1, 0, 2)),
        (CPUS, {"workers": 3}, {}, Share(2, 1, 0, 3)),
        (CPUS, {"workers": 2, "cpus_per_worker": 3}, {}, Share(1, 3, 0, 2)),
        (CPUS, {"workers": 4}, {"workers": 2}, Share(4, 1, 0, 2)),
        (CPUS, {"workers": 4}, {"workers": 1}, Share(8, 1, 0, 1)),
        (CPUS, {"workers": 2}, {"max_concurrent": 3}, Share(3, 1, 0, 2)),
        (GPUS, {"workers": 4}, {}, Share(2, 8, 1, 4)),
        (GPUS, {"workers": 3}, {}, Share(2, 8, 1, 3)),
        (replace(CPUS, trial_drivers=1), {"workers": 2}, {}, Share(1, 1, 0, 2)),
        (NO_DRIVERS, {}, {}, Share(8, 1, 0, 1)),
    ],
)
def test_so_many_trials_run_at_once_as_find_all_their_workers(
    resources: Resources, train: dict[str, Any], tune: dict[str, Any], share: Share
):
    assert share_for_trials(config(train, tune), resources) == share


@pytest.mark.parametrize(
    ("resources", "train", "tune", "part"),
    [
        (CPUS, {"workers": 9}, {}, "train.workers: found 9 for each trial, the cluster has 8 CPUs at 1 for each of a"),
        (CPUS, {"workers": 3, "cpus_per_worker": 3}, {}, "Set tune.workers to 2 at most"),
        (CPUS, {"workers": 2, "cpus_per_worker": 5}, {}, "train.cpus_per_worker: found 5 for a trial, the largest"),
        (CPUS, {"workers": 2}, {"max_concurrent": 5}, "tune.max_concurrent: found 5, the cluster has 8 CPUs"),
        (CPUS, {"workers": 2}, {"max_concurrent": 5}, "a trial's 2 workers. Set at most 4"),
        (GPUS, {"workers": 16}, {}, "train.workers: found 16 for each trial, the cluster has 8 GPUs. Set tune.workers"),
        (NO_DRIVERS, {"workers": 2}, {}, "tune: trials of 2 workers need the resource trial_driver, which no node has"),
    ],
)
def test_trials_that_cannot_fit_are_refused_at_once(
    resources: Resources, train: dict[str, Any], tune: dict[str, Any], part: str
):
    with pytest.raises(UserError) as refused:
        share_for_trials(config(train, tune), resources)
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)
