"""The timing of the models of a report: one task that takes a whole node, so that nothing computes beside it."""

from __future__ import annotations

from typing import Any

from raydistill.config.run import Config
from raydistill.data.shards import read_shard
from raydistill.errors import UserError
from raydistill.record.commit import Manifest
from raydistill.record.run import Run
from raydistill.stages.cluster import Resources
from raydistill.stages.latency import Load, Sources, measure
from raydistill.stages.progress import Progress

TIMED_ROWS = 1024

Speed = dict[str, dict[str, dict[str, Any]]]  # by device and model


def load_of(config: Config) -> Load:
    """What the config asks of the models."""
    asked = config.evaluate
    return Load(asked.latency_requests, asked.latency_rounds, asked.threads, config.data.max_length, asked.dtype)


def timed_devices(config: Config, resources: Resources) -> list[str]:
    """Where models are timed, the device of the report's tables first. Raises UserError for one that is not there."""
    found = config.evaluate.devices or (("cuda",) if resources.gpus else ("cpu",))
    if "cuda" in found and not resources.gpus:
        raise UserError("evaluate.devices: found cuda, and the cluster has no GPU. Set [cpu], or leave it out")
    return list(dict.fromkeys(found))


def time_models(
    sources: Sources, config: Config, run: Run, data: Manifest, resources: Resources, progress: Progress
) -> Speed:
    """What `measure` finds on every device. Raises Interrupted after a signal."""
    import ray

    load, devices = load_of(config), timed_devices(config, resources)
    progress.say(f"evaluate: timing {load.rounds * load.requests:,} single requests for each model")
    progress.check()
    texts = read_shard(run.home("data"), data.shards("test")[0]).texts[:TIMED_ROWS]
    remote: Any = ray.remote
    task = remote(_measure).options(num_cpus=resources.node_cpus, num_gpus=1 if "cuda" in devices else 0)
    running = task.remote(sources, texts, load, devices)
    while not ray.wait([running], timeout=0.5)[0]:
        progress.check()
    return ray.get(running)


def _measure(sources: Sources, texts: list[str], load: Load, devices: list[str]) -> Speed:
    return {device: measure(sources, texts, load, device) for device in devices}
