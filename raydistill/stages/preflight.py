"""What can be checked before a worker starts or a byte is written, and what a run will cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from raydistill.cache.codecs import CODECS
from raydistill.config.cross_tokenizer import crosses_tokenizers
from raydistill.config.run import Config
from raydistill.data.order import steps_per_epoch
from raydistill.data.shards import STUDENT_SPLITS
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.models.configuration import check_length, check_task, label_order
from raydistill.models.folders import find_model, refuse_adapter
from raydistill.record.commit import Manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.run import STAGES, Run
from raydistill.stages.adapted import check_adapters, check_quantising_device
from raydistill.stages.augmenting import mask_token
from raydistill.stages.calibration import calibration_plan, teacher_temperature
from raydistill.stages.cluster import Resources, check_precision, share_for_actors, share_for_training
from raydistill.stages.excluding import check_exclusion, excluded_rows, exclusion_line
from raydistill.stages.export import check_exports_stand
from raydistill.stages.feature_cache import check_lent_features, features_plan
from raydistill.stages.feature_cost import FeatureCost, feature_cost
from raydistill.stages.features import feature_terms
from raydistill.stages.language.student_rows import student_rows_plan
from raydistill.stages.prepare import Surveyed, data_plan
from raydistill.stages.progress import size
from raydistill.stages.search_cost import SearchCost, search_cost
from raydistill.stages.teach import teacher_dtype
from raydistill.stages.teachers import (
    check_member,
    config_of,
    folds_plan,
    is_ensemble,
    members,
    teacher_source,
    trainings,
)
from raydistill.stages.timing import timed_devices
from raydistill.stages.training_job import TrainingRequest, settings_of, training_plan
from raydistill.stages.training_stages import TrainingStage, training_stages
from raydistill.stages.unfreezing import check_unfreezing
from raydistill.stages.winner import winning_config
from raydistill.students.sizes import check_architecture
from raydistill.students.skeleton import student_skeleton
from raydistill.students.vocabulary import check_trimmable

CachePlan = Callable[[Config, Run, Manifest, Resources], Plan]
CODEC_BYTES = {"dense-float32": (4, 0), "dense-float16": (2, 0), "dense-int8": (1, 4)}


def check_models(config: Config, run: Run, labels: list[str]) -> None:
    """Teacher and student against the data. Raises UserError for the first thing that does not fit."""
    folder = find_model("teacher.model", config.teacher.model, config.teacher.revision)
    tokenizer = load_tokenizer(folder, "teacher.model")
    for start in dict.fromkeys(member.start for member in members(config)):
        check_member(start, config.data.max_length)
        if config.teacher.fine_tune is None:
            label_order(start.setting, start.folder(), labels)
            check_task(start.setting, start.folder(), config.task)
    check_lender(config, run)
    if config.student.init == "pretrained":
        assert config.student.model is not None
        student = find_model("student.model", config.student.model, config.student.revision)
        refuse_adapter("student.model", student)
        tokenizer = load_tokenizer(student, "student.model")
        _check_mask_token(config, tokenizer)
        check_length("the student", student, config.data.max_length)
    elif config.student.init == "config":
        check_architecture(config.student.model_type, config.student.embedding_size)
    if config.student.trim_vocabulary:
        check_trimmable(tokenizer)
    skeleton = _skeleton_maker(config, folder, labels)
    if config.student.init != "config":
        skeleton()
    check_training(config, folder, labels)
    if config.student.lora:
        check_adapters(config.student.lora, skeleton)
    check_lent_features(config, run, folder)
    check_exclusion(config, run, labels)


def check_training(config: Config, teacher_folder: Path, labels: list[str]) -> None:
    """What the student is trained with, against cache and models. Raises UserError."""
    check_features(config, teacher_folder)
    check_unfreezing(config, _skeleton_maker(config, teacher_folder, labels))


def _skeleton_maker(config: Config, teacher_folder: Path, labels: list[str]) -> Callable[[], Any]:
    """What makes the student without weights, where it is needed."""
    length = config.data.max_length
    return partial(student_skeleton, config.student, teacher_folder=teacher_folder, labels=labels, max_length=length)


def _check_mask_token(config: Config, tokenizer: Any) -> None:
    """Augmented texts hold the teacher's mask token, which the student's tokenizer must know as its own."""
    token = mask_token(config)
    if token is not None and tokenizer.mask_token != token:
        raise UserError(
            f"data.augment.mask: texts are masked with the teacher's {token!r}, the student's mask token is"
            f" {tokenizer.mask_token!r}. Set data.augment.mask=0, or choose a student with the teacher's tokenizer"
        )


def check_features(config: Config, folder: Path) -> None:
    """Every stage's loss against cache and models, and whose its features are where there are several teachers."""
    stages = training_stages("student", config)
    for stage in stages:
        _check_stage(stage, folder)
    terms = any(stage.settings.loss.features and not stage.own_teacher for stage in stages)
    named = config.teacher.features_of
    if terms and is_ensemble(config) and named is None:
        raise UserError(
            f"train.loss.features: are those of one teacher, and this run has {len(members(config))}. Name it:"
            " teacher.features_of=0 is teacher.model"
        )
    if not terms and named is not None:
        raise UserError("teacher.features_of: means nothing without train.loss.features. Remove it")


def check_lender(config: Config, run: Run) -> None:
    """A run that uses another's cache trains no teacher, so that all of them stand there."""
    if not run.lender or config.teacher.fine_tune is None:
        return
    if run.plan("teacher") is None:
        raise UserError(
            "teacher.fine_tune: the run in teacher.cache_from did not fine-tune its teacher. Remove the section"
        )
    for one in trainings(config):
        if run.complete(one.part) is None:
            where = run.home(one.part).where(one.part)
            raise UserError(f"teacher.cache_from: {where}: is missing. Ask for the teachers that run has, or finish it")


def _check_stage(stage: TrainingStage, teacher_folder: Path) -> None:
    codec, loss = stage.config.teacher.codec, stage.settings.loss
    for name in ("temperature", "temperature_end"):
        temperature = getattr(loss, name)
        if temperature is not None and not CODECS[codec].covers(temperature):
            raise UserError(f"{stage.loss_section}.{name}: {codec} does not cover {temperature}")
    feature_terms(stage.config, teacher_folder, stage)


def check_resources(config: Config, stages: tuple[str, ...], resources: Resources) -> None:
    """Every stage's share of the cluster. Raises UserError for what would wait for ever."""
    scores = "train" in stages and any(stage.own_teacher for stage in training_stages("student", config))
    asks = "prepare" in stages and config.data.synthesis is not None
    if "teach" in stages or "evaluate" in stages or scores or asks:
        share_for_actors(resources, actors=config.teacher.actors, cpus_per_actor=config.teacher.cpus_per_actor)
    if "evaluate" in stages:
        timed_devices(config, resources)
    roles = ["teacher"] if "teach" in stages and config.teacher.fine_tune else []
    roles += ["student"] if "train" in stages else []
    for role in roles:
        settings, section = settings_of(config, role)
        share_for_training(resources, settings, section)
        check_precision(resources, settings.precision, section)
    if "student" in roles or ("evaluate" in stages and config.evaluate.control):
        check_quantising_device(config.student, resources)


def check_plans(config: Config, run: Run, stages: tuple[str, ...], resources: Resources, cache_plan: CachePlan) -> None:
    """Compares every plan that can be known now with the one that stands, so that nothing is written for a refused one.

    A plan can be known once the parts that it is made from are complete. Raises UserError for the first that differs.
    """
    data = run.complete("data")
    if data is None:
        return
    if crosses_tokenizers(config):
        run.check("student_rows", student_rows_plan(config, run))
    if stages == ("prepare",):
        return
    if not run.lender and not _check_teachers(config, run, stages, data, resources):
        return
    if "teach" in stages:
        run.check("cache", cache_plan(config, run, data, resources))
    teacher = teacher_source(config, run)
    if config.teacher.calibrate and run.complete("cache") is not None:
        run.check("calibration", calibration_plan(run))
        if "teach" not in stages:
            teacher_temperature(config, run)
    features = features_plan(config, run, data, teacher.folder(), teacher_dtype(config, run, resources))
    if features is not None and ("teach" in stages or "train" in stages):
        run.check("features", features)
    made = run.complete("cache") is not None and (features is None or run.complete("features") is not None)
    if config.tune is not None:
        if run.complete("tune") is None or run.redo in STAGES[: STAGES.index("tune") + 1]:
            return  # what the student is trained with is not known yet
        config = winning_config(config, run)
    if "train" in stages and made:
        run.check("student", training_plan(TrainingRequest("student", config, run, resources, teacher)))
    if "export" in stages and (student := run.complete("student")) is not None:
        check_exports_stand(config, run, student)
    if "evaluate" in stages and config.evaluate.control:
        run.check("control", training_plan(TrainingRequest("control", config, run, resources, teacher)))


def _check_teachers(config: Config, run: Run, stages: tuple[str, ...], data: Manifest, resources: Resources) -> bool:
    """Compares the plans of the folds and of every teacher that is trained here; whether all are complete."""
    found = trainings(config)
    if "teach" in stages and config.teacher.cross_fit is not None:
        run.check("folds", folds_plan(config, data))
    for one in found if "teach" in stages else ():
        asked = config_of(config, one.member)
        source = one.member.start
        request = TrainingRequest("teacher", asked, run, resources, source, one.part, one.without_fold)
        run.check(one.part, training_plan(request))
    return all(run.complete(one.part) is not None for one in found)


@dataclass(frozen=True)
class Cost:
    """What a run will do."""

    rows: dict[str, int]
    teacher_forwards: int
    cache_bytes: int
    steps: dict[str, int]
    features: FeatureCost | None = None
    teachers: int = 1
    cross_fitted: tuple[int, int] = (0, 0)  # trainings without a fold, and their optimiser steps
    pass_bytes: int = 0
    student_forwards: int = 0
    student_cache_bytes: int = 0
    search: SearchCost | None = None
    exports: tuple[str, ...] = ()
    exclusion: str = ""

    def lines(self) -> list[str]:
        steps = ", ".join(f"{name} {count:,}" for name, count in self.steps.items())
        return [
            "rows: " + ", ".join(f"{count:,} {split}" for split, count in self.rows.items()),
            *self._teacher_lines(),
            f"cache: {size(self.cache_bytes)}"
            + (f", and {size(self.pass_bytes)} that it is made of" if self.pass_bytes else ""),
            f"optimiser steps at most: {steps}",
            *(self.search.lines() if self.search else []),
            *([self.exclusion] if self.exclusion else []),
            *(self.features.lines() if self.features else []),
            *([f"export: {', '.join(self.exports)}, each compared with the student"] if self.exports else []),
            *(
                [
                    f"student forwards as the teacher of later stages: {self.student_forwards:,} rows at most,"
                    f" {size(self.student_cache_bytes)} of cache"
                ]
                if self.student_forwards
                else []
            ),
        ]

    def _teacher_lines(self) -> list[str]:
        often = "once each" if self.teachers == 1 else f"once by each of {self.teachers} teachers"
        lines = [f"teacher forwards for the cache: {self.teacher_forwards:,} rows, {often}"]
        if trained := self.cross_fitted[0]:
            lines.append(
                f"cross-fitted teachers: {trained}, each trained without a fold of train, about"
                f" {self.cross_fitted[1]:,} optimiser steps beside those below"
            )
        return lines


def run_cost(config: Config, run: Run, surveyed: Surveyed | None) -> Cost:
    """The cost of a run over the rows that were found in its sources, or that stand in another run."""
    data = None if surveyed else run.require("data")
    rows = data.facts["rows"] if data else surveyed.rows if surveyed else {}
    labels = data.facts["labels"] if data else surveyed.labels if surveyed else []
    folder = find_model("teacher.model", config.teacher.model, config.teacher.revision)
    learnt = sum(rows.get(split, 0) for split in STUDENT_SPLITS)
    features = feature_cost(config, run, surveyed, folder, learnt)
    searched = search_cost(config, learnt, folder) if config.tune is not None else None
    found = cost(config, rows, len(labels), features, searched)
    return replace(found, exclusion=_exclusion(config, run, surveyed)) if config.train.exclude else found


def _exclusion(config: Config, run: Run, surveyed: Surveyed | None) -> str:
    """How many rows are excluded, where the teacher has scored those that were found."""
    data = run.complete("data")
    stands = data is not None and (surveyed is None or data.fingerprint == data_plan(config, surveyed).fingerprint)
    known = stands and run.complete("cache") is not None
    known = known and (not config.teacher.calibrate or run.complete("calibration") is not None)
    return exclusion_line(excluded_rows(config, run) if known else None)


def cost(
    config: Config,
    rows: dict[str, int],
    classes: int,
    features: FeatureCost | None = None,
    search: SearchCost | None = None,
) -> Cost:
    """The cost of a run over these rows."""
    per_class, per_row = CODEC_BYTES[config.teacher.codec]
    scored = sum(count for split, count in rows.items() if split != "test")
    learnt = sum(rows.get(split, 0) for split in STUDENT_SPLITS)
    teachers, folds = len(members(config)), config.teacher.cross_fit or 0
    steps: dict[str, int] = {}
    without_fold = 0
    if (tuning := config.teacher.fine_tune) is not None:
        steps["teacher"] = teachers * tuning.epochs * steps_per_epoch(rows["train"], tuning.batch_size)
        for fold in range(folds):
            kept = rows["train"] - len(range(fold, rows["train"], folds))
            without_fold += teachers * tuning.epochs * steps_per_epoch(kept, tuning.batch_size)
    for role in ("student", "control") if config.evaluate.control else ("student",):
        each = [stage.settings for stage in training_stages(role, config)]
        steps[role] = config.train.seeds * sum(s.epochs * steps_per_epoch(learnt, s.batch_size) for s in each)
    own = [stage for stage in training_stages("student", config) if stage.own_teacher]
    epochs_beside = sum(stage.settings.epochs for stage in own if stage.settings.loss.features)
    return Cost(
        rows,
        teacher_forwards=scored * teachers,
        cache_bytes=scored * (classes * per_class + per_row),
        steps=steps,
        features=features,
        teachers=teachers,
        cross_fitted=(teachers * folds, without_fold),
        pass_bytes=4 * classes * scored * teachers if teachers > 1 or folds else 0,
        student_forwards=config.train.seeds * (len(own) * scored + epochs_beside * learnt),
        student_cache_bytes=config.train.seeds * len(own) * scored * (classes * per_class + per_row),
        search=search,
        exports=config.export.formats if config.export else (),
    )
