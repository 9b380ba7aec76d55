"""Fitting actors and workers into a cluster: what is planned, and what is refused at once instead of hanging."""

import pytest

from raydistill.config.training import Training
from raydistill.errors import UserError
from raydistill.stages.cluster import (
    Resources,
    Share,
    check_precision,
    share_for_actors,
    share_for_training,
    start_local,
)

TWO_CPUS = Resources(cpus=2, gpus=0, node_cpus=2)
GPU_NODES = Resources(cpus=32, gpus=4, node_cpus=16)


@pytest.mark.parametrize(
    ("resources", "asked", "share"),
    [
        (TWO_CPUS, {}, Share(2, 1, 0)),
        (TWO_CPUS, {"actors": 1}, Share(1, 1, 0)),
        (TWO_CPUS, {"cpus_per_actor": 2}, Share(1, 2, 0)),
        (Resources(1, 0, 1), {}, Share(1, 1, 0)),
        (GPU_NODES, {}, Share(4, 1, 1)),
        (GPU_NODES, {"cpus_per_actor": 16}, Share(2, 16, 1)),
    ],
)
def test_actors_take_what_the_cluster_has(resources: Resources, asked: dict, share: Share) -> None:
    assert share_for_actors(resources, **{"actors": None, "cpus_per_actor": 1, **asked}) == share


@pytest.mark.parametrize(
    ("resources", "asked", "words"),
    [
        (TWO_CPUS, {"actors": 3}, "teacher.actors: found 3"),
        (TWO_CPUS, {"cpus_per_actor": 4}, "teacher.cpus_per_actor: found 4"),
        (Resources(4, 0, 2), {"cpus_per_actor": 4}, "largest node has 2 CPUs"),
        (GPU_NODES, {"actors": 5}, "4 GPUs"),
    ],
)
def test_actors_that_cannot_fit_are_refused(resources: Resources, asked: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        share_for_actors(resources, **{"actors": None, "cpus_per_actor": 1, **asked})


@pytest.mark.parametrize(
    ("resources", "settings", "share"),
    [
        (TWO_CPUS, {}, Share(1, 2, 0)),
        (TWO_CPUS, {"workers": 2}, Share(1, 1, 0, 2)),
        (TWO_CPUS, {"cpus_per_worker": 1}, Share(1, 1, 0)),
        (GPU_NODES, {"workers": 4}, Share(1, 8, 1, 4)),
        (GPU_NODES, {"workers": 1}, Share(1, 16, 1)),
    ],
)
def test_workers_share_the_cluster_evenly(resources: Resources, settings: dict, share: Share) -> None:
    assert share_for_training(resources, Training(**settings), "train") == share


@pytest.mark.parametrize(
    ("resources", "settings", "words"),
    [
        (TWO_CPUS, {"workers": 3}, "train.workers: found 3, the cluster has 2 CPUs"),
        (TWO_CPUS, {"workers": 2, "cpus_per_worker": 2}, "train.cpus_per_worker: found 2 for each of 2 workers"),
        (GPU_NODES, {"workers": 8}, "the cluster has 4 GPUs"),
    ],
)
def test_workers_that_cannot_fit_are_refused(resources: Resources, settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        share_for_training(resources, Training(**settings), "train")


def test_fp16_needs_a_gpu() -> None:
    check_precision(GPU_NODES, "fp16", "train")
    with pytest.raises(UserError, match=r"train.precision: found fp16, which needs a GPU"):
        check_precision(TWO_CPUS, "fp16", "train")


class Starting:
    """ray.init of a machine that is full for so many times."""

    def __init__(self, failures: int) -> None:
        self.failures, self.asked = failures, []

    def init(self, **options: object) -> None:
        self.asked.append(options["address"])
        if len(self.asked) <= self.failures:
            raise Exception("The current node timed out during startup.\nThis could happen because ...")

    def shutdown(self) -> None:
        self.asked.append("shutdown")


def test_a_cluster_that_does_not_start_in_time_is_started_once_more() -> None:
    ray = Starting(failures=1)
    start_local(ray, {"address": "local"})
    assert ray.asked == ["local", "shutdown", "local"]
    with pytest.raises(UserError, match=r"did not start \(The current node timed out during startup\.\)"):
        start_local(Starting(failures=9), {"address": "local"})
