"""Stage teach: the teacher, fine-tuned here when it is asked for, scores train and validation once; test it never sees.

What it writes is the teacher cache: one shard of logits for each data shard, and one of features for each shard
that the student learns from where the config wants them cached; one forward makes both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raydistill.config import Config
from raydistill.data.tokens import load_tokenizer
from raydistill.models import ModelSource, check_length, label_order, model_identity
from raydistill.record.commit import Manifest, commit_manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.run import PARTS, Run
from raydistill.stages.calibration import calibrate
from raydistill.stages.cluster import Resources, gains_from_bf16, share_for_actors
from raydistill.stages.feature_cache import commit_features, feature_output, features_plan
from raydistill.stages.feature_scoring import FeatureOutput
from raydistill.stages.progress import Progress, size
from raydistill.stages.scoring import ScoringJob, score
from raydistill.stages.trainer import train_model

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
    if config.teacher.fine_tune is not None and not run.lender:
        start = ModelSource("teacher.model", config.teacher.model, config.teacher.revision)
        train_model("teacher", config, run, resources, progress, source=start)
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
    (scored,) = score([replace(job, features=output)], data, {job.folder: SPLITS}, share, progress, "teach")
    if output is not None:
        made = commit_features(run, output, scored.features)
        facts, total = made.facts, sum(entry.size for entry in made.files)
        progress.say(
            f"teach: features of {facts['rows']:,} rows, {facts['bytes_per_row']:,.0f} bytes a row, {size(total)}"
        )
    if manifest is not None:
        return manifest
    entries, totals = scored.entries, scored.totals
    rows = sum(entry.rows for entry in entries)
    facts = {
        "codec": config.teacher.codec,
        "classes": len(data.facts["labels"]),
        "labels": data.facts["labels"],
        "temperatures": "any",
        "rows": rows,
        "forwards": rows - sum(e.rows for e in scored.made) + int(totals["rows"]),
        "bytes_per_row": sum(entry.size for entry in entries) / rows,
    }
    manifest = commit_manifest(run.store, "teacher/cache", plan.fingerprint, entries, facts)
    progress.say(
        f"teach: {rows:,} rows cached, one teacher forward each, {facts['bytes_per_row']:.0f} bytes a row,"
        f" {size(sum(e.size for e in entries))}"
        + (
            f"; {int(totals['at_max_length']):,} rows reach max_length and may be cut"
            if totals["at_max_length"]
            else ""
        )
    )
    return manifest


def _missing_features(config: Config, run: Run, data: Manifest, resources: Resources) -> FeatureOutput | None:
    """The cached features that are still to be made."""
    folder = teacher_source(config, run).folder()
    plan = features_plan(config, run, data, folder, teacher_dtype(config, run, resources))
    if plan is None or run.begin("features", plan) is not None:
        return None
    return feature_output(plan, folder)


def teacher_source(config: Config, run: Run) -> ModelSource:
    """The teacher that scores: fine-tuned here, or as the user gave it."""
    if config.teacher.fine_tune is not None:
        return made_here("teacher", run)
    return ModelSource("teacher.model", config.teacher.model, config.teacher.revision)


def made_here(part: str, run: Run) -> ModelSource:
    """A model that a training of the run wrote."""
    return ModelSource(f"the {part}", PARTS[part].product, store_url=run.home(part).root)


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
    }
