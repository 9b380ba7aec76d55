"""Stage tune: many students on a share of the rows, from the same cache; the best one's settings are what train takes.

The teacher is not run. Validation ranks the trials; the test shards are not opened.
"""

from __future__ import annotations

from typing import Any

from raydistill.config.file import to_yaml
from raydistill.config.points import with_point
from raydistill.config.run import Config
from raydistill.config.section import identity
from raydistill.errors import UserError
from raydistill.record.commit import MANIFEST, Entry, Manifest, commit_manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.report.pictures import text_of
from raydistill.report.search_page import render_search
from raydistill.search.trials import Trial, commonest_reason, winner
from raydistill.stages.cluster import Resources
from raydistill.stages.evaluate import forwards_per_row
from raydistill.stages.progress import Progress
from raydistill.stages.search import Search
from raydistill.stages.search_cost import early_rung, learnt_amount
from raydistill.stages.search_overview import overview
from raydistill.stages.search_report import search_facts
from raydistill.stages.search_rows import draw_rows
from raydistill.stages.search_tables import table_files, write_hparams
from raydistill.stages.teachers import teacher_source
from raydistill.stages.training_job import TrainingRequest, training_plan
from raydistill.stages.trial import Trials
from raydistill.stages.trial_logs import TrialLogs
from raydistill.stages.trial_runs import run_trials

FOLDER = "tune"


def tune(config: Config, run: Run, resources: Resources, progress: Progress) -> Manifest:
    """Searches, unless what is asked for stands complete, and writes the tables and `tune/best.yaml`; the manifest.

    Raises UserError when every trial fails, with the commonest reason, and Interrupted after a signal.
    """
    check_count(config, run)
    plan = tune_plan(config, run, resources)
    manifest = run.begin("tune", plan)
    if manifest is not None and _is_enough(config, manifest):
        progress.say(f"tune: complete, {result(manifest)}")
        TrialLogs(config, run, progress.say).close()
        return manifest
    search = _searched(config, run, resources, progress)
    if manifest is not None:
        run.store.remove(f"{FOLDER}/{MANIFEST}")  # its tables are about to be written anew
    manifest = _commit(config, run, plan, search)
    progress.say(f"tune: {result(manifest)}")
    _say_where(run, progress)
    return manifest


def _searched(config: Config, run: Run, resources: Resources, progress: Progress) -> Search:
    """The search at its end: every trial trained that is not, as far as time goes."""
    logs = TrialLogs(config, run, progress.say)

    def told(trial: Trial) -> None:
        progress.note(_line(config, trial))
        logs.told(trial)

    trials = Trials(config, run, resources, teacher_source(config, run), draw_rows(config, run))
    search = Search(trials, told, lambda line: progress.say(f"tune: {line}"))
    try:
        if search.next() is not None:  # else all that is missing is the summary
            _warn(config, run, progress)
            with progress.showing(lambda: overview(search, config.train.choose)):
                run_trials(search, trials, resources, progress)
    finally:
        logs.close()
    assert search.is_over or search.has_run_out_of_time
    return search


def _warn(config: Config, run: Run, progress: Progress) -> None:
    if warning := early_rung(config, learnt_amount(config, run.require("data").facts)):
        progress.say(f"tune: {warning}")


def tune_plan(config: Config, run: Run, resources: Resources) -> Plan:
    """Everything that determines a search, but for how many trials it has."""
    assert config.tune is not None
    plan = training_plan(TrainingRequest("student", config, run, resources, teacher_source(config, run), "tune"))
    settings = {f"tune.{name}": value for name, value in identity(config.tune, skip=("space",)).items()}
    space = {f"tune.space.{name}": _dimension(d) for name, d in config.tune.space.items()}
    return Plan("tune", {**plan.inputs, **settings, **space})


def _dimension(dimension: Any) -> dict[str, Any]:
    return {kind: value for kind, value in identity(dimension).items() if value is not None}


def result(manifest: Manifest) -> str:
    """What a search came to, in words."""
    facts = manifest.facts
    won, counts = facts["winner"], facts["statuses"]
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    shown = {n: text_of(value) if isinstance(value, list | dict) else value for n, value in won["point"].items()}
    values = ", ".join(f"{name}={value}" for name, value in shown.items())
    return (
        f"{facts['trials']} trials ({told}), {facts['steps']:,} steps, teacher forwards per row"
        f" {facts['teacher_forwards_per_row']:g}; trial {won['number']} won with validation {facts['metric']}"
        f" {won['value']:.4f} at epoch {won['epoch']}: {values}"
    )


def check_count(config: Config, run: Run) -> None:
    """Raises UserError when fewer trials are asked for than a finished search has."""
    manifest = run.complete("tune")
    if config.tune is None or manifest is None or run.redo is not None:
        return
    if config.tune.num_trials < manifest.facts["asked"]:
        raise UserError(
            f"tune.trials: found {config.tune.num_trials}, the search in {run.store.where(FOLDER)} has"
            f" {manifest.facts['asked']}. Ask for as many at least, or take another run name"
        )


def _is_enough(config: Config, manifest: Manifest) -> bool:
    """Whether a finished search is all that is asked for now, in number and in time."""
    assert config.tune is not None
    facts = manifest.facts
    if facts["asked"] < config.tune.num_trials:
        return False
    had = facts["time_budget"]
    return facts["is_over"] or (
        had is not None and config.tune.time_budget is not None and config.tune.time_budget <= had
    )


def _commit(config: Config, run: Run, plan: Plan, search: Search) -> Manifest:
    """The tables, TensorBoard's HParams and best.yaml, then the manifest that names them."""
    assert config.tune is not None
    metric, choose = config.tune.metric, config.train.choose
    if search.trials and all(trial.status == "failed" for trial in search.trials):
        raise UserError(
            f"tune: all {len(search.trials)} trials failed, most of them so: {commonest_reason(search.trials)}."
            " Change the space, or mend that; --redo tune searches again"
        )
    won = winner(search.trials, metric, choose)
    if won is None:
        raise UserError("tune.time_budget: ended before any trial had an epoch. Raise it, and run the same command")
    best, facts = to_yaml(with_point(config, won.point)), _facts(config, run, search, won)
    page = render_search(search_facts(config, run, search.trials, facts), best)
    files = table_files(search.trials, metric, choose) | {"best.yaml": best.encode(), "report.html": page.encode()}
    for name, data in files.items():
        run.store.write(f"{FOLDER}/{name}", data)
    write_hparams(run.store, search.trials, metric, choose)
    entries = [Entry(n, run.store.sha256(f"{FOLDER}/{n}"), run.store.size(f"{FOLDER}/{n}")) for n in files]
    return commit_manifest(run.store, FOLDER, plan.fingerprint, entries, facts)


def _facts(config: Config, run: Run, search: Search, won: Trial) -> dict[str, Any]:
    assert config.tune is not None
    metric, statuses = config.tune.metric, [trial.status for trial in search.trials]
    epoch = won.chosen_epoch(metric, config.train.choose)
    assert epoch is not None
    return {
        "metric": metric,
        "winner": {
            "number": won.number, "point": dict(won.point), "epoch": epoch, "value": won.curve[epoch - 1][metric]
        },
        "trials": len(search.trials),
        "asked": config.tune.num_trials,
        "is_over": search.is_over,
        "time_budget": config.tune.time_budget,
        "statuses": {status: statuses.count(status) for status in ("finished", "stopped", "failed", "running")},
        "steps": sum(trial.steps for trial in search.trials),
        "seconds": round(sum(trial.seconds for trial in search.trials), 1),
        "teacher_forwards_per_row": forwards_per_row(run.require("data"), run.require("cache")),
    }  # fmt: skip


def _line(config: Config, trial: Trial) -> str:
    """What is said of a trial after an epoch, and at its end."""
    assert config.tune is not None
    metric = config.tune.metric
    if trial.has_ended:
        return f"trial {trial.number}: {trial.status}" + (f", {trial.reason}" if trial.reason else "")
    values = ", ".join(f"{name} {trial.curve[-1][name]:.4f}" for name in dict.fromkeys((metric, "nll")))
    return f"trial {trial.number}: epoch {len(trial.curve)} of {trial.epochs}: {values}"


def _say_where(run: Run, progress: Progress) -> None:
    """How to open what the search wrote."""
    where = run.store.where(FOLDER)
    progress.say(f"tune: the page about it: {where}/report.html")
    progress.say(f"tune: every trial: {where}/trials.csv, .parquet; curves and HParams: tensorboard --logdir {where}")
    progress.say(f"tune: the winner's settings, which can be run as they are: {where}/best.yaml")
