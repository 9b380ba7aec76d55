"""Stage evaluate: teacher, student and control on the test set, which nothing else has read."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydistill.cache.shards import read_logits
from raydistill.config.run import Config
from raydistill.config.section import identity
from raydistill.data.shards import read_shard, read_split
from raydistill.losses.calibration import fit_label_temperature
from raydistill.losses.ensemble import ensemble_logits
from raydistill.models import ModelSource, model_identity, weight_files
from raydistill.record.commit import Entry, Manifest, commit_manifest, read_manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.record.store import Store
from raydistill.report.measures import measures_of
from raydistill.report.page import render
from raydistill.stages.calibration import teacher_temperature
from raydistill.stages.cluster import Resources, share_for_actors
from raydistill.stages.environment import device_name, environment
from raydistill.stages.latency import measure
from raydistill.stages.prepare import data_report
from raydistill.stages.progress import Progress
from raydistill.stages.scoring import score
from raydistill.stages.student import train_student
from raydistill.stages.teach import teacher_job
from raydistill.stages.teachers import is_ensemble, made_here, members, teacher_source, teacher_sources
from raydistill.stages.training_job import TrainingRequest

TIMED_ROWS = 1024
SPLITS = ("validation", "test")
Logits = dict[str, np.ndarray]


def evaluate(config: Config, run: Run, resources: Resources, progress: Progress) -> dict[str, Any]:
    """Writes report.json and report.html; the report. The control is trained first, when it is not there."""
    data, student = run.require("data"), run.require("student")
    control = None
    if config.evaluate.control:
        request = TrainingRequest("control", config, run, resources, teacher_source(config, run))
        control = train_student(request, progress)
    plan = report_plan(config, run, data, student, control)
    if run.begin("report", plan) is not None:
        progress.say("evaluate: complete")
        return json.loads(run.store.read("report/report.json"))
    sources = model_sources(config, run)
    scored = _score(sources, config, run, data, plan, resources, progress)
    logits = {name: parts[0] for name, parts in scored.items()}
    logits["teacher"] = _as_taught(config, run, scored["teacher"])
    speed = _time_models(sources, config, run, data, resources, progress)
    report = _report(config, run, data, sources, logits, speed, plan)
    if is_ensemble(config):
        report["teacher_members"] = _members_report(config, scored["teacher"], _labels(run, data, "test"))
    commit_report(run, plan, report)
    return report


def model_sources(config: Config, run: Run) -> dict[str, tuple[ModelSource, ...]]:
    """Every model that is compared, with the models that it is made of: several for an ensemble of teachers."""
    sources = {"teacher": teacher_sources(config, run), "student": (made_here("student", run),)}
    return sources | ({"control": (made_here("control", run),)} if config.evaluate.control else {})


def report_plan(config: Config, run: Run, data: Manifest, student: Manifest, control: Manifest | None) -> Plan:
    """Everything that the report depends on."""
    return Plan(
        "report",
        {
            "data": data.fingerprint,
            "student": student.fingerprint,
            "control": control.fingerprint if control else None,
            "teacher": model_identity(teacher_source(config, run).folder()),
            "data.max_length": config.data.max_length,
            **_ensemble_inputs(config, run),
            **{f"evaluate.{name}": value for name, value in identity(config.evaluate).items()},
        },
    )


def _ensemble_inputs(config: Config, run: Run) -> dict[str, Any]:
    if not is_ensemble(config):
        return {}
    models = [model_identity(source.folder()) for source in teacher_sources(config, run)]
    weights = [member.weight for member in members(config)]
    return {"teachers": models, "weights": weights, "teacher.combine": config.teacher.combine}


def _score(
    sources: dict[str, tuple[ModelSource, ...]],
    config: Config,
    run: Run,
    data: Manifest,
    plan: Plan,
    resources: Resources,
    progress: Progress,
) -> dict[str, list[Logits]]:
    """The float32 logits of every model's parts on validation (to fit its temperature) and test, in order of rows."""
    share = share_for_actors(resources, actors=config.teacher.actors, cpus_per_actor=config.teacher.cpus_per_actor)
    teacher = teacher_job(config, run, data, folder="", fingerprint=plan.fingerprint, dtype=config.evaluate.dtype)
    names = [(name, number) for name, parts in sources.items() for number in range(len(parts))]
    jobs = [
        replace(teacher, source=sources[name][number], folder=_logits_folder(name, number), codec="dense-float32")
        for name, number in names
    ]
    splits: dict[str, tuple[str, ...]] = {job.folder: SPLITS for job in jobs}
    result: dict[str, list[Logits]] = {name: [] for name in sources}
    for (name, _), job, scored in zip(names, jobs, score(jobs, data, splits, share, progress, "evaluate"), strict=True):
        facts = {"codec": job.codec, "classes": len(job.labels)}
        manifest = commit_manifest(run.store, job.folder, plan.fingerprint, scored.entries, facts)
        result[name].append({split: _logits(run.store, job.folder, manifest, split) for split in SPLITS})
    return result


def _as_taught(config: Config, run: Run, parts: list[Logits]) -> Logits:
    """The teacher's logits as its students saw them: the mean of its members, divided by its temperature."""
    divisor = teacher_temperature(config, run)
    if not is_ensemble(config):
        return {split: logits_NK / divisor for split, logits_NK in parts[0].items()}
    weights = [member.weight for member in members(config)]
    found: Logits = {}
    for split in SPLITS:
        of_members = [torch.from_numpy(part[split]) for part in parts]
        mean_NK = ensemble_logits(
            of_members, weights, combine=config.teacher.combine, multi_label=config.task == "multi_label"
        )
        found[split] = mean_NK.numpy() / divisor
    return found


def _members_report(config: Config, parts: list[Logits], labels: np.ndarray) -> list[dict[str, Any]]:
    """What the members of an ensemble reach alone on test."""
    alone = [measures_of(labels).metrics(part["test"], labels, 1.0) for part in parts]
    return [
        {"model": member.title, "weight": member.weight, "accuracy": metrics["accuracy"], "nll": metrics["nll"]}
        for member, metrics in zip(members(config), alone, strict=True)
    ]


def _logits_folder(name: str, number: int) -> str:
    return f"report/logits/{name}" + (f"-member-{number}" if number else "")


def _logits(store: Store, folder: str, manifest: Manifest, split: str) -> np.ndarray:
    return np.concatenate([read_logits(store, folder, entry, manifest).logits_NK for entry in manifest.shards(split)])


def _time_models(
    sources: dict[str, tuple[ModelSource, ...]],
    config: Config,
    run: Run,
    data: Manifest,
    resources: Resources,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Times the models in a task that takes a whole node, so that nothing else of the run computes beside it."""
    import ray

    progress.say(f"evaluate: timing {config.evaluate.latency_requests} single requests for each model")
    progress.check()
    first = read_shard(run.home("data"), data.shards("test")[0])
    remote: Any = ray.remote
    task = remote(measure)
    running = task.options(num_cpus=resources.node_cpus, num_gpus=1 if resources.gpus else 0).remote(
        sources,
        first.texts[:TIMED_ROWS],
        requests=config.evaluate.latency_requests,
        threads=config.evaluate.threads,
        max_length=config.data.max_length,
        dtype=config.evaluate.dtype,
    )
    while not ray.wait([running], timeout=0.5)[0]:
        progress.check()
    return ray.get(running)


def _report(
    config: Config,
    run: Run,
    data: Manifest,
    sources: dict[str, tuple[ModelSource, ...]],
    logits: dict[str, Logits],
    speed: dict[str, dict[str, float]],
    plan: Plan,
) -> dict[str, Any]:
    """All figures, under the names of the design."""
    labels = {split: _labels(run, data, split) for split in SPLITS}
    teacher, measures = logits["teacher"]["test"], measures_of(labels["test"])
    models: dict[str, Any] = {}
    for name, split in logits.items():
        temperature = fit_label_temperature(*map(torch.from_numpy, (split["validation"], labels["validation"])))
        models[name] = {
            **measures.metrics(split["test"], labels["test"], temperature),
            "agreement": float(measures.same(split["test"], teacher).mean()),
            "kl_to_teacher": measures.kl(teacher, split["test"]),
            **speed[name],
            "size_bytes": sum(size_bytes(source.folder()) for source in sources[name]),
        }
    comparison = measures.compare(
        labels["test"],
        {name: split["test"] for name, split in logits.items()},
        resamples=config.evaluate.bootstrap,
        seed=config.evaluate.seed,
    )
    cache = run.require("cache")
    return {
        "schema": 1,
        "name": config.name,
        "task": config.task,
        "created": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "labels": data.facts["labels"],
        "test_rows": len(labels["test"]),
        **models,
        **{name: getattr(comparison, name) for name in comparison.__dataclass_fields__},
        "agreement": models["student"]["agreement"],
        "teacher_combine": config.teacher.combine if is_ensemble(config) else None,
        "cross_fit": config.teacher.cross_fit,
        "teacher_temperature": teacher_temperature(config, run) if config.teacher.calibrate else None,
        "teacher_forwards_per_row": forwards_per_row(data, cache),
        "measured": {
            "latency_requests": config.evaluate.latency_requests,
            "threads": config.evaluate.threads,
            "dtype": config.evaluate.dtype,
            "device": device_name(),
        },
        "data_report": data_report(data.facts),
        "fingerprints": fingerprints(run, plan),
        "environment": environment(),
        "config": config.model_dump(mode="json"),
    }


def forwards_per_row(data: Manifest, cache: Manifest) -> float:
    """Rows that the teacher scored for the cache, by the records of its workers, for each row that is not test."""
    return cache.facts["forwards"] / sum(rows for split, rows in data.facts["rows"].items() if split != "test")


def _labels(run: Run, data: Manifest, split: str) -> np.ndarray:
    return np.concatenate([shard.labels_N for shard in read_split(run.home("data"), data.shards(split))])


def size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(folder))


def fingerprints(run: Run, plan: Plan) -> dict[str, str]:
    found = {
        part: manifest.fingerprint for part in run.parts() if part != "report" and (manifest := run.complete(part))
    }
    return {**found, "report": plan.fingerprint}


def commit_report(run: Run, plan: Plan, report: dict[str, Any]) -> None:
    """Both files, then the manifest that names them and every shard of logits."""
    run.store.write("report/report.json", json.dumps(report, indent=1).encode() + b"\n")
    run.store.write("report/report.html", render(report).encode())
    entries = [
        Entry(name, run.store.sha256(f"report/{name}"), run.store.size(f"report/{name}"))
        for name in ("report.json", "report.html")
    ]
    commit_manifest(run.store, "report", plan.fingerprint, entries)


def read_report(run: Run) -> dict[str, Any] | None:
    """The finished report of a run, or None."""
    return json.loads(run.store.read("report/report.json")) if read_manifest(run.store, "report") else None
