"""A run from its config to its report: which stages, in order, under one lock, with everything checked first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from raydistill.config.file import to_yaml
from raydistill.config.run import Config
from raydistill.errors import UserError
from raydistill.record.lock import run_lock
from raydistill.record.run import Run, open_run, part_of
from raydistill.stages.check_search import check_search, check_search_stands
from raydistill.stages.cluster import Resources, connect
from raydistill.stages.compared import check_compared
from raydistill.stages.export import check_export, export_part, export_plan
from raydistill.stages.extra_sets import check_sets
from raydistill.stages.language.student_rows import make_student_rows
from raydistill.stages.language.synthesis import answer_prompts
from raydistill.stages.language.text_plan import answers_plan
from raydistill.stages.preflight import check_plans, check_resources
from raydistill.stages.progress import Progress
from raydistill.stages.tasks import Cost, Surveyed, task_of
from raydistill.stages.trackers import check_trackers
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
    if stages == ("export",) and config.export is None:
        raise UserError("export: is missing. Add it, with formats such as [onnx, onnx-int8]")
    run = open_run(config.storage, config.name, cache_from=config.teacher.cache_from, redo=redo)
    task = task_of(config)
    with run_lock(run.store), progress.catching_signals():
        surveyed = check(config, run, stages, progress)
        with cluster(config, stages) as resources:
            progress.listen()
            check_resources(config, stages, resources)
            check_plans(config, run, stages, resources, task.cache_plan)
            if config.tune is not None:
                check_search_stands(config, run, stages, resources)
            for part in made_again(config, run, redo) if redo else ():
                run.set_aside(part)
            write_config(config, run)
            if "prepare" in stages:
                if config.data.synthesis is not None:
                    surveyed = answer_prompts(config, run, surveyed, resources, progress)
                task.prepare(config, run, surveyed, progress)
            if config.task == "causal_lm" and {"prepare", "tune", "train"} & set(stages):
                make_student_rows(config, run, progress)
            if "teach" in stages:
                task.teach(config, run, resources, progress)
            if "tune" in stages and config.tune is not None:
                tune(config, run, resources, progress)
            if "train" in stages or "evaluate" in stages:
                config = winning_config(config, run)
            if "train" in stages:
                train(config, run, resources, progress)
            if "export" in stages and config.export is not None:
                task.export(config, run, progress)
            return task.evaluate(config, run, resources, progress) if "evaluate" in stages else None


def check(config: Config, run: Run, stages: tuple[str, ...], progress: Progress) -> Surveyed | None:
    """Everything that can be checked without a worker; what prepare found in the sources, when it has work to do."""
    task, surveyed = task_of(config), None
    if "prepare" in stages and task.standing_data(config, run) is None:
        if run.lender:
            raise UserError(
                f"teacher.cache_from: {run.lender.root}: has no finished data of these files and settings."
                " Give the data section of that run, or leave cache_from out"
            )
        surveyed = task.survey(config, progress)
        run.check("data", task.data_plan(config, surveyed))
        if config.data.synthesis is not None:
            run.check("answers", answers_plan(config, surveyed))
    check_export(config)
    labels = surveyed.labels if surveyed else run.require("data").facts["labels"]
    if stages != ("prepare",) or config.data.synthesis is not None:  # what the teacher writes is dear
        task.check_models(config, run, labels)
        if config.tune is not None:
            check_search(config, run, labels, task)
            if "tune" in stages:
                check_trackers(config, run)
    if "evaluate" in stages:
        check_compared(config, labels)
        check_sets(config, labels)
    return surveyed


def made_again(config: Config, run: Run, stage: str) -> list[str]:
    """What is set aside at once when a stage is done again; of its other parts `begin` sets aside what does not fit.

    A report's control, its further seeds and the 8-bit teacher stay where they fit: they are trainings and files with
    settings of their own. Of exported files those that were made for other settings are made again, or all of them
    where none was.
    """
    if stage == "evaluate":
        return ["report"]
    if stage == "export" and config.export is not None and (student := run.complete("student")) is not None:
        found = {name: export_plan(config, name, student) for name in config.export.formats}
        if any(run.outdated(export_part(name), plan) for name, plan in found.items()):
            return []
    return [part for part in run.parts() if part_of(part).stage == stage]


def write_config(config: Config, run: Run) -> None:
    """The resolved configuration, which can be run as it is."""
    text = to_yaml(config).encode()
    if not run.store.exists("config.yaml") or run.store.read("config.yaml") != text:
        run.store.write("config.yaml", text)


@contextlib.contextmanager
def cluster(config: Config, stages: tuple[str, ...]) -> Iterator[Resources]:
    """The cluster, for stages that need one; a cluster that was started here ends with the run."""
    if set(stages) <= {"prepare", "export"} and not ("prepare" in stages and config.data.synthesis is not None):
        yield Resources(cpus=0, gpus=0, node_cpus=0)
        return
    import ray

    started_here = not ray.is_initialized()
    try:
        yield connect(config.cluster)
    finally:
        if started_here:
            ray.shutdown()


def plan(config: Config, progress: Progress) -> Cost:
    """What a run will cost, after every check that needs no worker. Writes nothing."""
    run, task = open_run(config.storage, config.name, cache_from=config.teacher.cache_from), task_of(config)
    surveyed = None if run.lender else task.survey(config, progress)
    labels = surveyed.labels if surveyed else run.require("data").facts["labels"]
    task.check_models(config, run, labels)
    if config.tune is not None:
        check_search(config, run, labels, task)
        check_trackers(config, run)
    check_export(config)
    check_compared(config, labels)
    check_sets(config, labels)
    return task.cost(config, run, surveyed)
