"""The training of a student, or its control, through its stages: a chain of trainings, each from what the last made.

A stage is a training with a folder, checkpoints and curves of its own under `train/stages/`, so that a run that was
killed goes on within the stage, and what the stages before it made stays. All have the fingerprint of the whole
training, which names the settings of every stage.
"""

from __future__ import annotations

from dataclasses import replace

from raydistill.models.folders import model_identity
from raydistill.models.source import ModelSource
from raydistill.record.commit import Manifest, commit_manifest, read_manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.stages.cluster import Resources, share_for_actors
from raydistill.stages.job import TrainingJob
from raydistill.stages.language.teach import next_tokens_job, score_next_tokens
from raydistill.stages.progress import Progress
from raydistill.stages.scoring import score
from raydistill.stages.teach import SPLITS, teacher_job
from raydistill.stages.trainer import begin_training, fit, result, train_model
from raydistill.stages.training_job import TrainingRequest, training_job
from raydistill.stages.training_stages import TrainingStage, training_stages

FACTS = ("metric", "value", "step", "steps", "seconds")


def train_student(request: TrainingRequest, progress: Progress) -> Manifest:
    """Trains the student or its control, stage by stage; the manifest of its folder.

    Raises what `train_model` and `score` raise.
    """
    if request.config.train.stages is None:
        return train_model(request, progress)
    plan, manifest = begin_training(request, progress)
    if manifest is not None:
        return manifest
    before: list[tuple[TrainingStage, Manifest]] = []
    for stage in training_stages(request.role, request.config, request.name):
        manifest = read_manifest(request.run.store, stage.product)
        if manifest is None or manifest.fingerprint != plan.fingerprint:
            job = _job(request, stage, plan, before)
            if stage.own_teacher:
                _score_with_previous(stage, request.run, plan, before[-1][0], request.resources, progress)
            fit(job, request.resources, progress)
            manifest = read_manifest(request.run.store, stage.product)
            assert manifest is not None
        progress.say(f"{stage.title}: {result(manifest)}, {manifest.facts['parameters']:,} parameters")
        before.append((stage, manifest))
    return before[-1][1]


def _job(
    request: TrainingRequest, stage: TrainingStage, plan: Plan, before: list[tuple[TrainingStage, Manifest]]
) -> TrainingJob:
    """The stage as what a worker is sent."""
    run = request.run
    job = training_job(replace(request, config=stage.config, stage=stage), plan)
    made = {s.name: {name: manifest.facts[name] for name in FACTS} for s, manifest in before}
    job = replace(
        job, title=stage.title, section=stage.section, folder=stage.folder, product=stage.product, stages_before=made
    )
    if stage.goes_on:
        job = replace(job, begins_with=_model(before[-1][0], run))
    if stage.own_teacher:
        teacher = _model(before[-1][0], run)
        job = replace(job, beside=teacher, own_cache=_cache_folder(stage), teacher_temperature=1.0)
    return job


def _model(stage: TrainingStage, run: Run) -> ModelSource:
    """What a stage made."""
    return ModelSource(f"the {stage.title}", stage.product, store_url=run.store.root)


def _cache_folder(stage: TrainingStage) -> str:
    return f"{stage.folder}/cache"


def _score_with_previous(
    stage: TrainingStage, run: Run, plan: Plan, before: TrainingStage, resources: Resources, progress: Progress
) -> None:
    """The outputs of the stage before on train and validation, as the teacher's stand in `teacher/cache`.

    So the student is the teacher of its next generation (Born-Again Networks, Furlanello et al. 2018,
    arXiv:1805.04770, section 3).
    """
    config, folder, source = stage.config, _cache_folder(stage), _model(before, run)
    standing = run.plan("cache")
    assert standing is not None
    dtype = standing.inputs["teacher.dtype"]
    inputs = {"training": plan.fingerprint, "stage": stage.name, "teacher": model_identity(source.folder())}
    # What of the codec of language models decides is in the fingerprint of the training, by its cache's.
    codec = {"teacher.codec": config.teacher.codec} if config.task != "causal_lm" else {}
    fingerprint = Plan("cache", inputs | codec | {"teacher.dtype": dtype}).fingerprint
    manifest = read_manifest(run.store, folder)
    if manifest is not None and manifest.fingerprint == fingerprint:
        return
    title, data = f"{stage.title}: the one before as teacher", run.require("data")
    if config.task == "causal_lm":
        asked = replace(next_tokens_job(config, run, data, source, dtype), folder=folder, fingerprint=fingerprint)
        score_next_tokens(config, run, asked, resources, progress, title)
        return
    share = share_for_actors(resources, actors=config.teacher.actors, cpus_per_actor=config.teacher.cpus_per_actor)
    job = replace(teacher_job(config, run, data, folder=folder, fingerprint=fingerprint, dtype=dtype), source=source)
    (scored,) = score([job], data, {folder: SPLITS}, share, progress, title)
    rows = sum(entry.rows for entry in scored.entries)
    facts = {"codec": config.teacher.codec, "classes": len(job.labels), "labels": list(job.labels), "rows": rows}
    commit_manifest(run.store, folder, fingerprint, scored.entries, facts)
    progress.say(f"{stage.title}: {rows:,} rows scored by the stage before")
