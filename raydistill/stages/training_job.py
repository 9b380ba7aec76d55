"""A training as a plan and as a job: what determines its result, and what its workers are sent. It knows no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from raydistill.config.cross_tokenizer import crosses_tokenizers
from raydistill.config.loss import KINDS_OF_SETS, LOSS_PARAMETERS, WITHOUT_TEMPERATURE, Loss
from raydistill.config.run import Config
from raydistill.config.section import identity
from raydistill.config.train import Train
from raydistill.config.training import TeacherMetrics, Training
from raydistill.data.folds import FoldRows
from raydistill.data.shards import LABELLED_SPLITS, STUDENT_SPLITS
from raydistill.losses.courses import Course
from raydistill.losses.objective import Objective
from raydistill.models.folders import find_model, find_tokenizer, model_identity, tokenizer_identity
from raydistill.models.source import ModelSource
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run, part_of
from raydistill.stages.calibration import calibration_plan, teacher_temperature
from raydistill.stages.cluster import Resources, gains_from_bf16
from raydistill.stages.excluding import exclusion_of, marks_input
from raydistill.stages.features import feature_terms
from raydistill.stages.job import TrainingJob
from raydistill.stages.language.objective import language_objective
from raydistill.stages.language.student_rows import student_rows_plan
from raydistill.stages.teachers import feature_source, folds_plan
from raydistill.stages.training_stages import TrainingStage, stage_inputs
from raydistill.students.build import needs_rows


@dataclass(frozen=True)
class TrainingRequest:
    """A training that a stage asks for, or one stage of a student's."""

    role: str  # teacher, student or control
    config: Config
    run: Run
    resources: Resources
    source: ModelSource  # what the model is built from
    part: str = ""  # of the run that it becomes, where that is not named as the role
    without_fold: int | None = None  # of train, that a teacher leaves out
    stage: TrainingStage | None = None  # whose settings `config` has then
    excluded: Mapping[str, int] | None = None  # rows by the parts of train.exclude

    @property
    def name(self) -> str:
        """Of the part of the run."""
        return self.part or self.role

    @property
    def settings(self) -> Training:
        return settings_of(self.config, self.role)[0]

    @property
    def section(self) -> str:
        """Where its settings stand."""
        return settings_of(self.config, self.role)[1]


def settings_of(config: Config, role: str) -> tuple[Training, str]:
    """The settings of a training and the section that they stand in."""
    if role == "teacher":
        assert config.teacher.fine_tune is not None
        return config.teacher.fine_tune, "teacher.fine_tune"
    return config.train, "train"


def training_plan(request: TrainingRequest) -> Plan:
    """Everything that determines a training's result."""
    role, config, run, settings = request.role, request.config, request.run, request.settings
    inputs: dict[str, Any] = {"data": run.require("data").fingerprint, "data.max_length": config.data.max_length}
    if role == "teacher":
        inputs["teacher.model"] = model_identity(request.source.folder())
        if request.without_fold is not None:
            folds = folds_plan(config, run.require("data")).fingerprint
            inputs |= {"teacher.folds": folds, "without_fold": request.without_fold}
    else:
        inputs |= student_inputs(config, request.source)
        if crosses_tokenizers(config):
            inputs["student_rows"] = student_rows_plan(config, run).fingerprint
    if role == "student":
        inputs |= _taught_inputs(config, run)
    skip = ("precision", "loss", "exclude") if role == "control" else ("precision",)
    if isinstance(settings, Train) and settings.stages is not None:
        inputs[f"{request.section}.stages"] = stage_inputs(role, config)
    else:
        inputs |= {f"{request.section}.{name}": value for name, value in identity(settings, skip=skip).items()}
        if role == "control":
            inputs[f"{request.section}.loss.label_smoothing"] = config.train.loss.label_smoothing
    inputs["precision"] = resolve_precision(settings, run.plan(request.name), request.resources)
    return Plan(role, inputs)


def _taught_inputs(config: Config, run: Run) -> dict[str, Any]:
    """What determines a student's targets."""
    inputs: dict[str, Any] = {"cache": run.require("cache").fingerprint}
    if config.teacher.calibrate:
        inputs["teacher.calibrate"] = calibration_plan(run).fingerprint
    if config.teacher.features_of is not None:
        inputs["teacher.features_of"] = config.teacher.features_of
    if config.train.caches_features:
        inputs["features"] = run.require("features").fingerprint
    return inputs | marks_input(config, run)


def student_inputs(config: Config, teacher: ModelSource) -> dict[str, Any]:
    """What determines a student's first weights and tokenizer."""
    inputs: dict[str, Any] = {
        f"student.{name}": value for name, value in identity(config.student).items() if value is not None
    }
    if config.student.tokenizer is not None:
        inputs["student.tokenizer"] = tokenizer_identity(find_tokenizer("student.tokenizer", config.student.tokenizer))
    if config.student.init == "pretrained":
        assert config.student.model is not None
        inputs["student.model"] = model_identity(
            find_model("student.model", config.student.model, config.student.revision)
        )
    else:
        facts = model_identity(teacher.folder())
        names = ("tokenizer_sha256",) if config.student.init == "config" else tuple(facts)
        inputs["teacher"] = {name: facts[name] for name in names}
    return inputs


def start_fingerprint(role: str, config: Config, run: Run, source: ModelSource) -> str | None:
    """What determines a student's first weights where they need rows of train; None where they do not.

    The control has the student's, so that both begin with the same.
    """
    if role == "teacher" or not needs_rows(config.student):
        return None
    inputs = {"data": run.require("data").fingerprint, "data.max_length": config.data.max_length}
    return Plan("start", inputs | student_inputs(config, source) | {"train.seed": config.train.seed}).fingerprint


def resolve_precision(settings: Training, standing: Plan | None, resources: Resources) -> str:
    """The precision asked for; for auto, what the standing training has, else what the device gains from."""
    if settings.precision != "auto":
        return settings.precision
    if standing is not None:
        return str(standing.inputs["precision"])
    return "bf16" if gains_from_bf16(resources) else "fp32"


def training_job(request: TrainingRequest, plan: Plan) -> TrainingJob:
    """The plan, or one stage of it, as what a worker is sent."""
    role, config, run, source, settings = request.role, request.config, request.run, request.source, request.settings
    part, response = request.name, response_kind("forward_kl", config.task)
    objective, courses = Objective(kind=response), {}
    if isinstance(settings, Train):
        smoothing = settings.loss.label_smoothing
        objective = Objective(kind=response, label_smoothing=smoothing)
        if role == "student":
            features = feature_terms(config, source.folder(), request.stage)
            excludes = settings.exclude is not None and settings.loss.has_teacher
            objective = replace(student_objective(settings.loss, config.task), features=features, excludes=excludes)
            courses = loss_courses(settings.loss)
    if config.task == "causal_lm":
        objective = language_objective(role, settings)
    has_features = isinstance(objective, Objective) and bool(objective.features)
    # A control has no teacher, in its choice of checkpoint neither.
    metric = "nll" if role == "control" and settings.metric in TeacherMetrics else settings.metric
    data, fold = run.require("data"), request.without_fold
    counted = data.shards(*(LABELLED_SPLITS if role == "teacher" else student_splits(config)))
    rows = None if fold is None else FoldRows(run.home("folds").root, fold, inside=False)
    epoch_rows = (
        sum(e.rows for e in counted) if rows is None else sum(map(rows.open().count, (e.file for e in counted)))
    )
    return TrainingJob(
        role=role, title=part, section=request.section, config=config, settings=settings, objective=objective,
        metric=metric, precision=plan.inputs["precision"], labels=tuple(data.facts["labels"]),
        fingerprint=plan.fingerprint, run_url=run.store.root, data_url=run.home("data").root,
        uses_cache=role == "student", splits=student_splits(config) if role == "student" else LABELLED_SPLITS,
        epoch_rows=epoch_rows, source=source, start=start_fingerprint(role, config, run, source),
        teacher_temperature=teacher_temperature(config, run) if role == "student" else 1.0,
        beside=feature_source(config, run) if has_features and config.teacher.features_of else None,
        unfreeze=settings.unfreeze if isinstance(settings, Train) else None,
        exclusion=exclusion_of(config, run) if role == "student" else None, excluded=request.excluded,
        folder=part_of(part).folder, product=part_of(part).product, courses=courses, rows=rows,
    )  # fmt: skip


def student_splits(config: Config) -> tuple[str, ...]:
    """What a student learns from: with no logits of its teacher, from what that wrote alone (arXiv:1606.07947)."""
    return ("unlabelled",) if config.teacher.keeps_no_logits else STUDENT_SPLITS


def student_objective(loss: Loss, task: str = "classification") -> Objective:
    """The settings as what a student is trained with."""
    parameters = {name: value for name in LOSS_PARAMETERS if (value := getattr(loss, name)) is not None}
    return Objective(
        temperature=1.0 if loss.kind in WITHOUT_TEMPERATURE else loss.temperature, alpha=loss.alpha,
        kind=response_kind(loss.kind, task),
        parameters=parameters, standardise=loss.standardise, label_smoothing=loss.label_smoothing,
        hard_targets=loss.hard_targets, always_response=loss.alpha_end is not None,
    )  # fmt: skip


def response_kind(kind: str, task: str) -> str:
    """The name of a kind of loss in losses/registry.py: sets of labels have their own."""
    return KINDS_OF_SETS[kind] if task == "multi_label" else kind


def loss_courses(loss: Loss) -> dict[str, Course]:
    """The numbers of the objective that change from step to step."""
    ends = {"temperature": loss.temperature_end, "alpha": loss.alpha_end}
    shape = loss.course or "linear"
    return {name: Course(getattr(loss, name), end, shape) for name, end in ends.items() if end is not None}
