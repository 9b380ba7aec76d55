"""Stage evaluate: teacher, student, control and other models on the test set, which nothing else has read."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch

from raydistill.config.run import Config
from raydistill.config.section import identity
from raydistill.data.shards import read_split
from raydistill.losses.calibration import fit_label_temperature
from raydistill.models.folders import model_identity
from raydistill.models.source import ModelSource
from raydistill.record.commit import Manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.record.store import Store
from raydistill.report import proof
from raydistill.report.over_seeds import over_seeds
from raydistill.stages.calibration import teacher_temperature
from raydistill.stages.cluster import Resources
from raydistill.stages.compared import Compared, compared_models, quantise_teacher, repeated_models
from raydistill.stages.compared_scores import Logits, as_compared, members_report, score_models
from raydistill.stages.curves import read_curves
from raydistill.stages.environment import device_name, environment
from raydistill.stages.extra_sets import ExtraSet, find_sets, set_store, slices_of, write_set
from raydistill.stages.prepare import data_report
from raydistill.stages.progress import Progress
from raydistill.stages.repetitions import Repetition, repeat, repeated, repetitions
from raydistill.stages.report_files import commit_report, standing_report
from raydistill.stages.review import reviewed
from raydistill.stages.student import train_student
from raydistill.stages.teachers import is_ensemble, members, teacher_source, teacher_sources
from raydistill.stages.timing import Speed, load_of, time_models
from raydistill.stages.training_job import TrainingRequest
from raydistill.stages.training_stages import training_stages

SPLITS = ("validation", "test")
NAMED_APART = ("models", "sets", "quantise_teacher")  # settings that a plan holds by what they name


def evaluate(config: Config, run: Run, resources: Resources, progress: Progress) -> dict[str, Any]:
    """Writes report.json and report.html; the report. The control is trained first, when it is not there."""
    data, student = run.require("data"), run.require("student")
    control = None
    if config.evaluate.control:
        request = TrainingRequest("control", config, run, resources, teacher_source(config, run))
        control = train_student(request, progress)
        repeat("control", config, run, resources, progress)
    if config.evaluate.quantise_teacher:
        quantise_teacher(config, run, progress)
    models, sets = compared_models(config, run), find_sets(config)
    plan = report_plan(config, run, data, student, control, models, sets)
    if run.begin("report", plan) is not None:
        progress.say("evaluate: complete")
        return standing_report(run)
    scored = score_models(
        models + repeated_models(config, run), config, run, data, plan, resources, progress, splits=SPLITS
    )
    logits = as_compared(config, run, scored)
    on_sets = {one.name: _on_set(one, models, logits, config, run, plan, resources, progress) for one in sets}
    speed = time_models({model.name: model.parts for model in models}, config, run, data, resources, progress)
    report = _report(config, run, data, models, logits, speed, plan) | {"sets": on_sets}
    if is_ensemble(config):
        report["teacher_members"] = members_report(config, scored["teacher"], _labels(run, data, "test"))
    if again := repetitions(config):
        rows = _rows(run.home("data"), data, data.facts["labels"], {name: s["test"] for name, s in logits.items()})
        report["seeds"] = over_seeds([_training(rows, config.train.seed), *(_training(rows, o.seed, o) for o in again)])
    commit_report(run, plan.fingerprint, report)
    return report


def report_plan(
    config: Config,
    run: Run,
    data: Manifest,
    student: Manifest,
    control: Manifest | None,
    models: list[Compared],
    sets: list[ExtraSet],
) -> Plan:
    """Everything that the report depends on."""
    inputs: dict[str, Any] = {
        "data": data.fingerprint,
        "student": student.fingerprint,
        "control": control.fingerprint if control else None,
        "teacher": model_identity(teacher_source(config, run).folder()),
        "data.max_length": config.data.max_length,
        **_ensemble_inputs(config, run),
        **{f"evaluate.{name}": value for name, value in identity(config.evaluate, skip=NAMED_APART).items()},
    }
    others = {model.name: model.parts[0].identity() for model in models if model.name not in proof.OURS}
    inputs |= {"compared": others} if others else {}
    again = {part: manifest.fingerprint for part, manifest in repeated(config, run).items()}
    inputs |= {"seeds": again} if again else {}
    inputs |= {"sets": {one.name: one.identity() for one in sets}} if sets else {}
    return Plan("report", inputs)


def _ensemble_inputs(config: Config, run: Run) -> dict[str, Any]:
    if not is_ensemble(config):
        return {}
    models = [model_identity(source.folder()) for source in teacher_sources(config, run)]
    weights = [member.weight for member in members(config)]
    return {"teachers": models, "weights": weights, "teacher.combine": config.teacher.combine}


def _on_set(
    one: ExtraSet,
    models: list[Compared],
    on_test: dict[str, Logits],
    config: Config,
    run: Run,
    plan: Plan,
    resources: Resources,
    progress: Progress,
) -> dict[str, Any]:
    """What the models reach on a further set; of one that is out of domain, whether they are less certain there."""
    names = run.require("data").facts["labels"]
    data, store = write_set(one, config, run, names, progress), set_store(run, one.name)
    scored = score_models(
        models, config, run, data, plan, resources, progress, splits=("test",), set_name=one.name, data_url=store.root
    )
    logits = {name: split["test"] for name, split in as_compared(config, run, scored).items()}
    if one.asked.out_of_domain:
        return proof.out_of_domain({name: split["test"] for name, split in on_test.items()}, logits)
    rows = _rows(store, data, names, logits)
    return proof.of_set(rows, slices_of(one), resamples=config.evaluate.bootstrap, seed=config.evaluate.seed)


def _rows(store: Store, data: Manifest, names: list[str], logits: dict[str, np.ndarray]) -> proof.Rows:
    """The test rows of prepared data beside what models say of them."""
    shards = list(read_split(store, data.shards("test")))
    texts = [text for shard in shards for text in shard.texts]
    return proof.Rows(texts, np.concatenate([shard.labels_N for shard in shards]), names, logits)


def _report(
    config: Config,
    run: Run,
    data: Manifest,
    models: list[Compared],
    logits: dict[str, Logits],
    speed: Speed,
    plan: Plan,
) -> dict[str, Any]:
    """All figures, under the names of the design."""
    asked, names = config.evaluate, data.facts["labels"]
    rows = _rows(run.home("data"), data, names, {model.name: logits[model.name]["test"] for model in models})
    labels = torch.from_numpy(_labels(run, data, "validation"))
    temperatures = {
        model.name: fit_label_temperature(torch.from_numpy(logits[model.name]["validation"]), labels)
        for model in models
    }
    bootstrap = {"resamples": asked.bootstrap, "seed": asked.seed}
    found = {model.name: _figures(model, rows, temperatures, speed, config) for model in models}
    ours = {name: found[name] for name in proof.OURS if name in found}
    others = [
        {"name": model.name, "kind": model.kind, **found[model.name], **proof.retention(rows, model.name, **bootstrap)}
        for model in models
        if model.name not in ours
    ]
    device = next(iter(speed))
    return {
        "schema": 2,
        "name": config.name,
        "task": config.task,
        "created": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "labels": names,
        "test_rows": len(rows.texts),
        **ours,
        "others": others,
        **proof.proof(rows, temperatures, asked=asked.retention, **bootstrap),
        "agreement": ours["student"]["agreement"],
        "speed": speed,
        "curves": validation_curves(config, run),
        "teacher_combine": config.teacher.combine if is_ensemble(config) else None,
        "cross_fit": config.teacher.cross_fit,
        "teacher_temperature": teacher_temperature(config, run) if config.teacher.calibrate else None,
        "base_models": base_models(config),
        "hub_datasets": hub_datasets(config),
        "review": reviewed(run),
        "excluded": run.require("student").facts.get("excluded"),
        "teacher_forwards_per_row": forwards_per_row(data, run.require("cache")),
        "measured": {
            "latency_requests": load_of(config).rounds * load_of(config).requests,
            "threads": asked.threads,
            "dtype": asked.dtype,
            "device": device_name(),
            "timed_on": device,
            "price_per_hour": asked.price_per_hour,
        },
        "data_report": data_report(data.facts),
        "fingerprints": fingerprints(run, plan),
        "environment": environment(),
        "config": config.model_dump(mode="json"),
    }


def _training(rows: proof.Rows, seed: int, again: Repetition | None = None) -> dict[str, Any]:
    """What the training with a seed reached: the run's first one, or a repetition."""
    names = {role: again.part(role) if again else role for role in ("student", "control")}
    return {"seed": seed, **proof.of_training(rows, names["student"], names["control"])}


def _figures(
    model: Compared, rows: proof.Rows, temperatures: dict[str, float], speed: Speed, config: Config
) -> dict[str, Any]:
    """What one model reaches and costs."""
    first = next(iter(speed.values()))[model.name]
    found = {
        **proof.figures(rows, model.name, temperatures[model.name]),
        **first,
        "size_bytes": sum(map(size_bytes, model.parts)),
    }
    if (price := config.evaluate.price_per_hour) is not None:
        found["cost_per_million"] = price / 3600 * 1e6 / first["rows_per_second"]
    return found


def validation_curves(config: Config, run: Run) -> dict[str, list[dict[str, Any]]]:
    """The validations of student and control by optimiser step, stage after stage."""
    found: dict[str, list[dict[str, Any]]] = {}
    for role in ("student", "control") if config.evaluate.control else ("student",):
        points, before = [], 0
        for stage in training_stages(role, config):
            own = [point for point in read_curves(run.store, stage.folder) if point["group"] == "validation"]
            points += [{**point, "step": before + point["step"]} for point in own]
            before = points[-1]["step"] if points else 0
        found[role] = points
    return found


def base_models(config: Config) -> list[str]:
    """The hub ids of what the student came from; a folder's path says nothing elsewhere."""
    named = [config.teacher.model, *([config.student.model] if config.student.init == "pretrained" else [])]
    return [model for model in dict.fromkeys(named) if model and not os.path.isabs(model) and not os.path.isdir(model)]


def hub_datasets(config: Config) -> list[str]:
    """The hub ids of the data sets that train came from."""
    train = config.data.train
    name = train.removeprefix("hf://").partition("@")[0].partition(":")[0]
    return [name] if train.startswith("hf://") and not name.startswith("/") else []


def forwards_per_row(data: Manifest, cache: Manifest) -> float:
    """Rows that the teacher scored for the cache, by the records of its workers, for each row that is not test."""
    return cache.facts["forwards"] / sum(rows for split, rows in data.facts["rows"].items() if split != "test")


def _labels(run: Run, data: Manifest, split: str) -> np.ndarray:
    return np.concatenate([shard.labels_N for shard in read_split(run.home("data"), data.shards(split))])


def size_bytes(source: ModelSource) -> int:
    """Of a model's weights on disk."""
    return sum(path.stat().st_size for path in source.weights())


def fingerprints(run: Run, plan: Plan) -> dict[str, str]:
    found = {
        part: manifest.fingerprint for part in run.parts() if part != "report" and (manifest := run.complete(part))
    }
    return {**found, "report": plan.fingerprint}
