"""A run from its config to its report: which stages, in order, under one lock, with everything checked first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from raydistill.config.file import to_yaml
from raydistill.config.run import Config
from raydistill.data.shards import STUDENT_SPLITS
from raydistill.errors import UserError
from raydistill.models import find_model
from raydistill.record.lock import run_lock
from raydistill.record.run import Run, open_run, part_of
from raydistill.stages.check_search import check_search, check_search_stands
from raydistill.stages.cluster import Resources, connect
from raydistill.stages.evaluate import evaluate
from raydistill.stages.feature_cost import feature_cost
from raydistill.stages.preflight import Cost, check_models, check_plans, check_resources, cost
from raydistill.stages.prepare import Surveyed, data_plan, prepare, standing_data, survey_sources
from raydistill.stages.progress import Progress
from raydistill.stages.teach import teach
from raydistill.stages.train import train
from raydistill.stages.tune import tune
from raydistill.stages.winner import winning_config


def run_stages(
    config: Config, stages: tuple[str, ...], progress: Progress, *, redo: str | None = None
) -> dict[str, Any] | None:
    """Does the stages in order, skipping what is complete; the report, when evaluate is among them.

    Raises UserError for what the user can mend, before anything is written, and Interrupted after a signal.
    """
    if redo and redo not in stages:
        raise UserError(f"--redo {redo}: this command does {', '.join(stages)} only. Use raydistill run --redo {redo}")
    if stages == ("tune",) and config.tune is None:
        raise UserError("tune: is missing. Add it, with a space to search and a number of trials")
    run = open_run(config.storage, config.name, cache_from=config.teacher.cache_from, redo=redo)
    with run_lock(run.store), progress.catching_signals():
        surveyed = check(config, run, stages, progress)
        with cluster(config, stages) as resources:
            progress.listen()
            check_resources(config, stages, resources)
            check_plans(config, run, stages, resources)
            if config.tune is not None:
                check_search_stands(config, run, stages, resources)
            if redo:
                for part in run.parts():
                    if part_of(part).stage == redo:
                        run.set_aside(part)
            write_config(config, run)
            if "prepare" in stages:
                prepare(config, run, surveyed, progress)
            if "teach" in stages:
                teach(config, run, resources, progress)
            if "tune" in stages and config.tune is not None:
                tune(config, run, resources, progress)
            if "train" in stages or "evaluate" in stages:
                config = winning_config(config, run)
            if "train" in stages:
                train(config, run, resources, progress)
            return evaluate(config, run, resources, progress) if "evaluate" in stages else None


def check(config: Config, run: Run, stages: tuple[str, ...], progress: Progress) -> Surveyed | None:
    """Everything that can be checked without a worker; what prepare found in the sources, when it has work to do."""
    surveyed = None
    if "prepare" in stages and standing_data(config, run) is None:
        if run.lender:
            raise UserError(
                f"teacher.cache_from: {run.lender.root}: has no finished data of these files and settings."
                " Give the data section of that run, or leave cache_from out"
            )
        surveyed = survey_sources(config, progress)
        run.check("data", data_plan(config, surveyed))
    labels = surveyed.labels if surveyed else run.require("data").facts["labels"]
    if stages != ("prepare",):
        check_models(config, run, labels)
        if config.tune is not None:
            check_search(config, run, labels)
    return surveyed


def write_config(config: Config, run: Run) -> None:
    """The resolved configuration, which can be run as it is."""
    text = to_yaml(config).encode()
    if not run.store.exists("config.yaml") or run.store.read("config.yaml") != text:
        run.store.write("config.yaml", text)


@contextlib.contextmanager
def cluster(config: Config, stages: tuple[str, ...]) -> Iterator[Resources]:
    """The cluster, for stages that need one; a cluster that was started here ends with the run."""
    if stages == ("prepare",):
        yield Resources(cpus=0, gpus=0, node_cpus=0)
        return
    import ray

    started_here = not ray.is_initialized()
    try:
        yield connect(config)
    finally:
        if started_here:
            ray.shutdown()


def plan(config: Config, progress: Progress) -> Cost:
    """What a run will cost, after every check that needs no worker. Writes nothing."""
    run = open_run(config.storage, config.name, cache_from=config.teacher.cache_from)
    surveyed = None
    if run.lender:
        data = run.require("data")
        rows, labels = data.facts["rows"], data.facts["labels"]
    else:
        surveyed = survey_sources(config, progress)
        rows, labels = surveyed.rows, surveyed.labels
    check_models(config, run, labels)
    if config.tune is not None:
        check_search(config, run, labels)
    folder = find_model("teacher.model", config.teacher.model, config.teacher.revision)
    learnt = sum(rows.get(split, 0) for split in STUDENT_SPLITS)
    return cost(config, rows, len(labels), feature_cost(config, run, surveyed, folder, learnt))
