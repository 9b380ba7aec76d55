"""Stage teach: the teacher, fine-tuned here when it is asked for, scores train and validation once; test it never sees.

What it writes is the teacher cache: one shard of logits for each data shard, and one of features for each shard
that the student learns from where the config wants them cached; one forward makes both. With several teachers there is
one cache of their mean, and with cross-fitting each train row is scored by a teacher that has not learned from it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raydistill.config.run import Config
from raydistill.data.tokens import load_tokenizer
from raydistill.models.configuration import check_length, label_order
from raydistill.models.folders import model_identity
from raydistill.record.commit import Entry, Manifest, commit_manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.stages.calibration import calibrate
from raydistill.stages.cluster import Resources, gains_from_bf16, share_for_actors
from raydistill.stages.feature_cache import commit_features, feature_output, features_plan
from raydistill.stages.feature_scoring import FeatureOutput
from raydistill.stages.passes import features_pass, make_folds, score_passes
from raydistill.stages.progress import Progress, size
from raydistill.stages.scoring import Scored, ScoringJob, score
from raydistill.stages.teachers import (
    config_of,
    feature_source,
    has_passes,
    members,
    targets_inputs,
    teacher_source,
    trainings,
)
from raydistill.stages.trainer import train_model
from raydistill.stages.training_job import TrainingRequest

SPLITS = ("train", "validation", "unlabelled", "augmented")  # one that the data do not have adds nothing


def teach(config: Config, run: Run, resources: Resources, progress: Progress) -> Manifest:
    """Writes the teacher cache, and its temperature where one is asked for; the cache's manifest.

    Raises UserError for a teacher that does not fit the data.
    """
    manifest = _teach(config, run, resources, progress)
    if config.teacher.calibrate:
        calibrate(run, progress)
    return manifest


def _teach(config: Config, run: Run, resources: Resources, progress: Progress) -> Manifest:
    data = run.require("data")
    if run.lender:
        run.require("cache")
    else:
        train_teachers(config, run, resources, progress)
    plan = cache_plan(config, run, data, resources)
    manifest = run.begin("cache", plan)
    output = _missing_features(config, run, data, resources)
    if manifest is not None and output is None:
        progress.say(f"teach: complete, {sum(e.rows for e in manifest.files):,} rows cached")
        return manifest
    share = share_for_actors(resources, actors=config.teacher.actors, cpus_per_actor=config.teacher.cpus_per_actor)
    job = teacher_job(
        config, run, data, folder="teacher/cache", fingerprint=plan.fingerprint, dtype=plan.inputs["teacher.dtype"]
    )
    if not has_passes(config):
        scored = score([replace(job, features=output)], data, {job.folder: SPLITS}, share, progress, "teach")
        entries, features = scored[0].entries, scored[0].features
    else:
        entries, scored = ([], []) if manifest else score_passes(config, run, data, job, SPLITS, share, progress)
        features = features_pass(config, run, data, job, output, share, progress) if output else []
    if output is not None:
        _commit_features(run, output, features, progress)
    return manifest or _commit_cache(config, run, data, plan, entries, scored, progress)


def train_teachers(config: Config, run: Run, resources: Resources, progress: Progress) -> None:
    """Every fine-tuning that the config asks for, one after the other; what is complete is kept."""
    if config.teacher.cross_fit is not None:
        make_folds(config, run, progress)
    for one in trainings(config):
        asked, source = config_of(config, one.member), one.member.start
        request = TrainingRequest("teacher", asked, run, resources, source, one.part, one.without_fold)
        train_model(request, progress)


def _commit_features(run: Run, output: FeatureOutput, entries: list[Entry], progress: Progress) -> None:
    made = commit_features(run, output, entries)
    facts, total = made.facts, sum(entry.size for entry in made.files)
    progress.say(f"teach: features of {facts['rows']:,} rows, {facts['bytes_per_row']:,.0f} bytes a row, {size(total)}")


def _commit_cache(
    config: Config,
    run: Run,
    data: Manifest,
    plan: Plan,
    entries: list[Entry],
    scored: list[Scored],
    progress: Progress,
) -> Manifest:
    """The manifest of the cache, which says how often a teacher ran."""
    rows = sum(entry.rows for entry in entries)
    kept = sum(entry.rows for one in scored for entry in one.entries) - sum(e.rows for one in scored for e in one.made)
    forwards = kept + int(sum(one.totals["rows"] for one in scored))
    facts = {
        "codec": config.teacher.codec,
        "classes": len(data.facts["labels"]),
        "labels": data.facts["labels"],
        "temperatures": "any",
        "rows": rows,
        "forwards": forwards,
        "bytes_per_row": sum(entry.size for entry in entries) / rows,
    }
    manifest = commit_manifest(run.store, "teacher/cache", plan.fingerprint, entries, facts)
    passes = len(scored) // len(members(config))
    cut = [sum(one.totals["at_max_length"] for one in scored[n : n + passes]) for n in range(0, len(scored), passes)]
    progress.say(
        f"teach: {rows:,} rows cached, {forwards / rows:g} teacher forward{'s' if forwards != rows else ''} each,"
        f" {facts['bytes_per_row']:.0f} bytes a row, {size(sum(e.size for e in entries))}"
        + (f"; {int(max(cut)):,} rows reach max_length and may be cut" if max(cut) else "")
    )
    return manifest


def _missing_features(config: Config, run: Run, data: Manifest, resources: Resources) -> FeatureOutput | None:
    """The cached features that are still to be made."""
    folder = teacher_source(config, run).folder()
    plan = features_plan(config, run, data, folder, teacher_dtype(config, run, resources))
    if plan is None or run.begin("features", plan) is not None:
        return None
    return feature_output(plan, feature_source(config, run).folder())


def teacher_job(config: Config, run: Run, data: Manifest, *, folder: str, fingerprint: str, dtype: str) -> ScoringJob:
    """How the teacher scores shards into a folder."""
    return ScoringJob(
        source=teacher_source(config, run),
        labels=tuple(data.facts["labels"]),
        data_url=run.home("data").root,
        output_url=run.store.root,
        folder=folder,
        fingerprint=fingerprint,
        codec=config.teacher.codec,
        dtype=dtype,
        max_length=config.data.max_length,
        tokens_per_batch=config.teacher.tokens_per_batch,
    )


def teacher_dtype(config: Config, run: Run, resources: Resources) -> str:
    """The forward pass's dtype: as asked; as the standing cache was made; or what this cluster gains from."""
    if config.teacher.dtype != "auto":
        return config.teacher.dtype
    standing = run.plan("cache")
    if standing is not None:
        return str(standing.inputs["teacher.dtype"])
    return "bfloat16" if gains_from_bf16(resources) else "float32"


def cache_plan(config: Config, run: Run, data: Manifest, resources: Resources) -> Plan:
    """Everything that determines the bytes of the cache."""
    return Plan("cache", cache_inputs(config, run, data, teacher_dtype(config, run, resources)))


def cache_inputs(config: Config, run: Run, data: Manifest, dtype: str) -> dict[str, Any]:
    """Checks the teacher against the data and names what determines its outputs."""
    folder = teacher_source(config, run).folder()
    labels = data.facts["labels"]
    check_length("the teacher", folder, config.data.max_length)
    load_tokenizer(folder, "teacher.model")
    return {
        "data": data.fingerprint,
        "teacher": model_identity(folder),
        "label_order": label_order("teacher.model", folder, labels),
        "data.max_length": config.data.max_length,
        "teacher.codec": config.teacher.codec,
        "teacher.dtype": dtype,
        **targets_inputs(config, run, data),
    }
