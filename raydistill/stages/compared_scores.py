"""The logits of every model of a report, scored over the cluster as a teacher scores its cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from raydistill.cache.shards import read_logits
from raydistill.config.run import Config
from raydistill.losses.ensemble import ensemble_logits
from raydistill.record.commit import Manifest, commit_manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.record.store import Store
from raydistill.report.measures import measures_of
from raydistill.stages.calibration import teacher_temperature
from raydistill.stages.cluster import Resources, share_for_actors
from raydistill.stages.compared import Compared
from raydistill.stages.progress import Progress
from raydistill.stages.scoring import ScoringJob, score
from raydistill.stages.teach import teacher_job
from raydistill.stages.teachers import is_ensemble, members

CODEC = "dense-float32"
Logits = dict[str, np.ndarray]  # float32 (N, K) by split


def score_models(
    models: list[Compared],
    config: Config,
    run: Run,
    data: Manifest,
    plan: Plan,
    resources: Resources,
    progress: Progress,
    *,
    splits: tuple[str, ...],
    set_name: str | None = None,
    data_url: str | None = None,
) -> dict[str, list[Logits]]:
    """The logits of every model's parts on these splits, in order of rows; of a set, its data are at `data_url`."""
    share = share_for_actors(resources, actors=config.teacher.actors, cpus_per_actor=config.teacher.cpus_per_actor)
    job = teacher_job(
        config, run, run.require("data"), folder="", fingerprint=plan.fingerprint, dtype=config.evaluate.dtype
    )
    job = replace(job, codec=CODEC, data_url=data_url or job.data_url)
    parts = [(model.name, number, source) for model in models for number, source in enumerate(model.parts)]
    jobs = [replace(job, source=source, folder=_folder(name, number, set_name)) for name, number, source in parts]
    result: dict[str, list[Logits]] = {model.name: [] for model in models}
    wanted: dict[str, tuple[str, ...]] = {one.folder: splits for one in jobs}
    what = f"evaluate: {set_name}" if set_name else "evaluate"
    for (name, _, _), one, scored in zip(parts, jobs, score(jobs, data, wanted, share, progress, what), strict=True):
        result[name].append(_committed(run.store, one, scored.entries, splits))
    return result


def _folder(name: str, number: int, set_name: str | None) -> str:
    place = f"report/sets/{set_name}/logits" if set_name else "report/logits"
    return f"{place}/{name}" + (f"-member-{number}" if number else "")


def _committed(store: Store, job: ScoringJob, entries: list[Any], splits: tuple[str, ...]) -> Logits:
    facts = {"codec": job.codec, "classes": len(job.labels)}
    manifest = commit_manifest(store, job.folder, job.fingerprint, entries, facts)
    return {
        split: np.concatenate(
            [read_logits(store, job.folder, entry, manifest).logits_NK for entry in manifest.shards(split)]
        )
        for split in splits
    }


def as_compared(config: Config, run: Run, scored: dict[str, list[Logits]]) -> dict[str, Logits]:
    """One array for each model and split: the teacher's as its students saw them, of all members and calibrated."""
    return {name: parts[0] for name, parts in scored.items()} | {"teacher": _as_taught(config, run, scored["teacher"])}


def _as_taught(config: Config, run: Run, parts: list[Logits]) -> Logits:
    divisor = teacher_temperature(config, run)
    if not is_ensemble(config):
        return {split: logits_NK / divisor for split, logits_NK in parts[0].items()}
    weights = [member.weight for member in members(config)]
    found: Logits = {}
    for split in parts[0]:
        of_members = [torch.from_numpy(part[split]) for part in parts]
        mean_NK = ensemble_logits(
            of_members, weights, combine=config.teacher.combine, multi_label=config.task == "multi_label"
        )
        found[split] = mean_NK.numpy() / divisor
    return found


def members_report(config: Config, parts: list[Logits], labels: np.ndarray) -> list[dict[str, Any]]:
    """What the members of an ensemble reach alone on test."""
    alone = [measures_of(labels).metrics(part["test"], labels, 1.0) for part in parts]
    return [
        {"model": member.title, "weight": member.weight, "accuracy": metrics["accuracy"], "nll": metrics["nll"]}
        for member, metrics in zip(members(config), alone, strict=True)
    ]
