"""The Ray cluster: connect to it, see what it has, and fit actors and workers into it before any is asked for."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.config.run import Cluster, Config
from raydistill.config.training import Training
from raydistill.errors import UserError, first_line
from raydistill.record.store import LocalStore, Store

OBJECT_STORE_BYTES = 300_000_000
# glibc gives a step's larger tensors back to the system and takes them anew, page by page: a tenth of a small step.
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
# What the driver of a trial of several workers takes in the place of a CPU that these workers would wait for.
TRIAL_DRIVER = "trial_driver"


@dataclass(frozen=True)
class Resources:
    """What a cluster has in all, and the most that one node has."""

    cpus: int
    gpus: int
    node_cpus: int
    trial_drivers: int = 0  # trials of several workers that may have their driver there
    nodes: tuple[tuple[int, int], ...] = ()  # CPUs and GPUs of each

    def room(self, cpus: int, gpus: int) -> int:
        """How many processes of so much its nodes hold."""
        nodes = self.nodes or ((self.cpus, self.gpus),)
        return sum(min(has[0] // cpus, has[1] // gpus if gpus else has[0]) for has in nodes)


@dataclass(frozen=True)
class Share:
    """How a stage divides a cluster: processes, and what each one takes, or each of the workers that it starts."""

    processes: int
    cpus: int
    gpus: int
    workers: int = 1


def connect(asked: Cluster, setting: str = "cluster.address") -> Resources:
    """Connects to the cluster of the job, the one that is asked for, or a new local one on loopback; what it has."""
    import ray

    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else Ray's own notes stand among the progress
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
        os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        if os.environ.get("RAY_ADDRESS"):
            _connect_to(ray, "RAY_ADDRESS", os.environ["RAY_ADDRESS"], options)
        elif asked.address != "local":
            _connect_to(ray, setting, asked.address, {**options, "address": asked.address})
        else:
            cpus = asked.cpus or len(os.sched_getaffinity(0))
            # Nobody takes this machine away from it: one process less for every training.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            local = {
                "address": "local", "num_cpus": cpus, "include_dashboard": False, "resources": {TRIAL_DRIVER: 100},
                "object_store_memory": OBJECT_STORE_BYTES, "_node_ip_address": "127.0.0.1",
                "runtime_env": {"env_vars": _paths() | KEPT_MEMORY},
            }  # fmt: skip
            start_local(ray, {**options, **local})
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Resources(
        cpus=int(sum(n.get("CPU", 0) for n in nodes)),
        gpus=int(sum(n.get("GPU", 0) for n in nodes)),
        node_cpus=int(max((n.get("CPU", 0) for n in nodes), default=0)),
        trial_drivers=int(sum(n.get(TRIAL_DRIVER, 0) for n in nodes)),
        nodes=tuple((int(n.get("CPU", 0)), int(n.get("GPU", 0))) for n in nodes),
    )


def start_local(ray: Any, options: dict[str, Any]) -> None:
    """Once more where Ray gives up: it waits 30 seconds for its own processes, which a full machine overruns."""
    for last in (False, True):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises a plain one when it has waited too long
            if last:
                raise UserError(
                    f"a local Ray cluster did not start ({first_line(error)}). Is the machine out of processors, memory"
                    f" or space in {tempfile.gettempdir()}? Try again when it has some, or name a cluster that runs"
                    " with cluster.address"
                ) from error
            ray.shutdown()


def _connect_to(ray: Any, setting: str, address: str, options: dict[str, Any]) -> None:
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises many kinds for an address where nothing answers
        raise UserError(
            f"{setting}: {address}: cannot be reached ({first_line(error)}). Check the address and RAY_AUTH_TOKEN"
        ) from None


def _paths() -> dict[str, str]:
    """Lets workers import the package as this process does, installed or not."""
    package_parent = str(Path(__file__).resolve().parents[2])
    return {"PYTHONPATH": os.pathsep.join([package_parent, *filter(None, [os.environ.get("PYTHONPATH")])])}


def worker_environment(resources: Resources) -> dict[str, str]:
    """Environment of training workers."""
    # torch 2.13 says of every collective of ZeRO-3 that it will change its name.
    environment = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "PYTHONWARNINGS": "ignore::FutureWarning", **KEPT_MEMORY}
    if not resources.gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def share_for_actors(resources: Resources, *, actors: int | None, cpus_per_actor: int) -> Share:
    """The teacher's actor pool. Raises UserError when what was asked for cannot fit; never waits for it."""
    by_cpus = resources.cpus // cpus_per_actor
    room = min(resources.gpus, by_cpus) if resources.gpus else by_cpus
    if cpus_per_actor > resources.node_cpus or room < 1:
        raise UserError(
            f"teacher.cpus_per_actor: found {cpus_per_actor}, the largest node has {resources.node_cpus} CPUs."
            " Lower it or add a node"
        )
    if actors is not None and actors > room:
        what = f"{resources.gpus} GPUs" if resources.gpus else f"{resources.cpus} CPUs at {cpus_per_actor} for each"
        raise UserError(f"teacher.actors: found {actors}, the cluster has {what}. Set at most {room}, or leave it out")
    return Share(actors or room, cpus_per_actor, 1 if resources.gpus else 0)


def share_for_training(resources: Resources, settings: Training, setting: str) -> Share:
    """The workers of a training. Raises UserError when what was asked for cannot fit; never waits for it."""
    room = resources.gpus or resources.cpus
    if settings.workers > room:
        what = "GPUs" if resources.gpus else "CPUs"
        raise UserError(
            f"{setting}.workers: found {settings.workers}, the cluster has {room} {what}. Set at most {room}"
        )
    cpus = settings.cpus_per_worker or max(1, min(resources.cpus // settings.workers, resources.node_cpus))
    if cpus * settings.workers > resources.cpus or cpus > resources.node_cpus:
        raise UserError(
            f"{setting}.cpus_per_worker: found {cpus} for each of {settings.workers} workers, the cluster has"
            f" {resources.cpus} CPUs, {resources.node_cpus} on its largest node. Lower it"
        )
    return Share(1, cpus, 1 if resources.gpus else 0, settings.workers)


def share_for_trials(config: Config, resources: Resources) -> Share:
    """How many trials run at once, and what each, or each of its workers, takes.

    Raises UserError when what was asked for cannot fit: all that run at once have their workers at once, so that none
    waits for what another holds.
    """
    assert config.tune is not None
    workers, gpus = config.trial_workers, 1 if resources.gpus else 0
    cpus = config.train.cpus_per_worker or (max(1, resources.cpus // resources.gpus) if gpus else 1)
    if cpus > resources.node_cpus:
        raise UserError(
            f"train.cpus_per_worker: found {cpus} for a trial, the largest node has {resources.node_cpus}. Lower it"
        )
    places = resources.room(cpus, gpus)
    each = "trial" if workers == 1 else f"of a trial's {workers} workers"
    what = f"{resources.gpus} GPUs" if gpus else f"{resources.cpus} CPUs at {cpus} for each {each}"
    if workers > places:
        setting = "train.workers" if config.tune.workers is None else "tune.workers"
        raise UserError(
            f"{setting}: found {workers} for each trial, the cluster has {what}. Set tune.workers to {places} at most"
        )
    room = places // workers
    if workers > 1:
        if not resources.trial_drivers:
            raise UserError(
                f"tune: trials of {workers} workers need the resource {TRIAL_DRIVER}, which no node has. Start one with"
                f" --resources='{{\"{TRIAL_DRIVER}\": 100}}', or set tune.workers=1"
            )
        room = min(room, resources.trial_drivers)
    asked = config.tune.max_concurrent
    if asked is not None and asked > room:
        raise UserError(f"tune.max_concurrent: found {asked}, the cluster has {what}. Set at most {room}")
    return Share(asked or room, cpus, gpus, workers)


def check_precision(resources: Resources, precision: str, setting: str) -> None:
    """Raises UserError for a precision that the device does not have."""
    if precision == "fp16" and not resources.gpus:
        raise UserError(
            f"{setting}.precision: found fp16, which needs a GPU and the cluster has none. Use bf16 or fp32"
        )


def gains_from_bf16(resources: Resources) -> bool:
    """Whether bfloat16 products are faster here: on GPUs, and on CPUs that multiply it themselves."""
    if resources.gpus:
        return True
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def ray_storage(store: Store, scratch: str) -> dict[str, Any]:
    """Where Ray Train and Tune keep their own notes: a folder of the run that every node reaches."""
    if isinstance(store, LocalStore):
        return {"storage_path": store.where(scratch)}
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    files, path = fsspec.core.url_to_fs(store.where(scratch))
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(files))}


class Mailbox:
    """A Ray actor between the driver and its workers: progress one way, the request to stop the other way."""

    def __init__(self) -> None:
        self._updates: list[dict[str, Any]] = []
        self._stop = False

    def post(self, update: dict[str, Any]) -> None:
        self._updates.append(update)

    def take(self) -> list[dict[str, Any]]:
        updates, self._updates = self._updates, []
        return updates

    def stop(self) -> None:
        self._stop = True

    def stopped(self) -> bool:
        return self._stop


def new_mailbox() -> Any:
    return beside_driver(Mailbox)


def beside_driver(kind: type) -> Any:
    """A new actor on the driver's node, so that the loss of any other node leaves it as it is."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(num_cpus=0)(kind)
    return remote.options(scheduling_strategy=here).remote()


def remove_orphans() -> None:
    """Removes the placement groups of this job whose maker has died, and with them what they hold of the cluster.

    Ray keeps such a group until the job ends too. Its makers are the controllers of Ray Train, which die with a trial's
    process. Ray's own cleaner asks the dashboard, which a local cluster has not. Ray's list of them has no public form
    that names the maker.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    messages: Any = gcs_pb2  # whose names are made as it is imported
    job = ray.get_runtime_context().get_job_id()
    for row in state._connect_and_get_accessor().get_placement_group_table():
        found = messages.PlacementGroupTableData.FromString(row)
        removed = found.state == messages.PlacementGroupTableData.REMOVED
        by_driver = ray.ActorID(found.creator_actor_id).is_nil()  # Ray calls its maker dead too, since it is no actor
        orphaned = found.creator_actor_dead and not by_driver and found.creator_job_id.hex() == job
        if orphaned and not removed:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(found.placement_group_id)))
