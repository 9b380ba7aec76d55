"""One training as its workers are sent it, and what they make of it: the model, the teacher beside it, the rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from raydistill.config.run import Config
from raydistill.config.training import Training
from raydistill.data.exclusion import Exclusion
from raydistill.data.feature_targets import cached_features
from raydistill.data.folds import FoldRows
from raydistill.data.loader import Split
from raydistill.data.tokens import ids_in, load_tokenizer
from raydistill.losses.courses import Course
from raydistill.losses.objective import Objective
from raydistill.losses.token_objective import TokenObjective
from raydistill.models.configuration import shape_of
from raydistill.models.kinds import CLASSIFIER, ModelKind
from raydistill.models.loading import load_classifier, start_classifier
from raydistill.models.source import ModelSource
from raydistill.record.commit import Manifest, read_manifest
from raydistill.record.store import Store, open_store
from raydistill.stages.start import made_before, made_once, start_folders, train_rows
from raydistill.students.build import build_student
from raydistill.taught import FeatureTeacher, TaughtStudent


@dataclass(frozen=True)
class TrainingJob:
    """One training. Every field can be sent to a worker."""

    role: str  # teacher, student or control
    title: str  # what progress calls it: the part of the run that it makes, or a stage of it
    section: str  # where its settings stand
    config: Config
    settings: Training
    objective: Objective | TokenObjective
    metric: str
    precision: str
    labels: tuple[str, ...]
    fingerprint: str
    run_url: str
    data_url: str
    uses_cache: bool
    teacher_temperature: float  # what the cached logits are divided by
    splits: tuple[str, ...]  # what it learns from
    epoch_rows: int  # what an epoch counts: a control without its student's unlabelled rows takes as many steps
    source: ModelSource  # what the model is built from: the start of a teacher, the teacher of a student
    start: str | None  # the fingerprint of a student's first weights, where they need rows of train
    folder: str
    product: str
    rows: FoldRows | None  # of train, that it learns from; None: all
    beside: ModelSource | None = None  # the teacher of features, where it is another than `source`
    courses: Mapping[str, Course] = field(default_factory=dict[str, Course])  # of the objective's numbers that change
    begins_with: ModelSource | None = None  # the model whose weights it goes on from, in the place of first ones
    unfreeze: float | tuple[float, ...] | None = None  # when the student's depths begin to train
    exclusion: Exclusion | None = None  # rows that are not learned from the teacher
    excluded: Mapping[str, int] | None = None  # how many they are
    own_cache: str | None = None  # the folder, in the run, of other targets than the teacher's
    stages_before: Mapping[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])  # what they came to


def class_objective(job: TrainingJob) -> Objective:
    """The objective of a training of a classifier."""
    assert isinstance(job.objective, Objective)
    return job.objective


def build_model(job: TrainingJob, *, alone: bool = False) -> tuple[Any, Any]:
    """The model with its first weights, and its tokenizer; the same on every rank.

    Collective, but for a rank that builds it `alone` once more, after all have built it.
    """
    labels, length = list(job.labels), job.config.data.max_length
    if job.begins_with is not None:
        return CLASSIFIER.load(job.begins_with.setting, job.begins_with.folder())
    folder = job.source.folder()
    if job.role == "teacher":
        torch.manual_seed(job.settings.seed)
        setting = job.source.setting
        return start_classifier(setting, folder, labels), load_tokenizer(folder, setting)
    build = functools.partial(
        build_student, job.config.student, teacher_folder=folder, labels=labels, max_length=length,
        seed=job.settings.seed,
    )  # fmt: skip
    return first_student(job, build, train_rows, kind=CLASSIFIER, alone=alone)


def first_student(
    job: TrainingJob, build: Callable[..., tuple[Any, Any]], rows: Callable[[Store, Manifest], Any], *,
    kind: ModelKind, alone: bool,
) -> tuple[Any, Any]:  # fmt: skip
    """A student as `build` makes it; made once for the whole training where it is made of rows of train."""
    if job.start is None:
        return build()
    store, data = open_store(job.run_url), open_store(job.data_url)
    if alone:
        return made_before(store, start_folders(job.folder), job.start, kind=kind)
    manifest = read_manifest(data, "data")
    assert manifest is not None
    make = functools.partial(build, rows=rows(data, manifest))
    length = job.config.data.max_length
    return made_once(store, start_folders(job.folder), job.start, make, max_length=length, kind=kind)


def with_features(
    job: TrainingJob, student: Any, tokenizer: Any, device: torch.device
) -> tuple[TaughtStudent, FeatureTeacher | None]:
    """The student with its projections, and the teacher that runs beside it unless its features are cached."""
    terms, dtype = class_objective(job).features, {"fp32": torch.float32}.get(job.precision, torch.bfloat16)
    source = job.beside or job.source
    folder = source.folder()
    taught = TaughtStudent(student, terms, teacher_width=shape_of(folder).width, seed=job.settings.seed)
    if job.config.train.loss.features_from == "cache":
        return taught, None
    teacher = load_classifier(source.setting, folder, dtype=dtype)
    ids = ids_in(load_tokenizer(folder, source.setting), tokenizer)
    token_ids = None if ids is None else torch.from_numpy(ids)
    return taught, FeatureTeacher(teacher, terms, device=device, token_ids=token_ids)


def open_split(job: TrainingJob, splits: tuple[str, ...], tokenizer: Any) -> Split:
    """The rows of some splits as this training has them."""
    store = open_store(job.data_url)
    data = read_manifest(store, "data")
    targets, folder = (store, "teacher/cache") if job.own_cache is None else (open_store(job.run_url), job.own_cache)
    cache = read_manifest(targets, folder) if job.uses_cache else None
    assert data is not None
    assert cache is not None or not job.uses_cache
    from_cache = splits == job.splits and job.config.train.loss.features_from == "cache"
    return Split(
        store, splits, data, cache, tokenizer=tokenizer, max_length=job.config.data.max_length,
        teacher_temperature=job.teacher_temperature, rows=job.rows if "train" in splits else None,
        cache_store=targets, cache_folder=folder, exclusion=job.exclusion if splits == job.splits else None,
        features=cached_features(store, class_objective(job).features) if from_cache else None,
    )  # fmt: skip
