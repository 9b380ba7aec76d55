"""What can be checked before a worker starts or a byte is written, and what a run will cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raydistill.cache.codecs import CODECS
from raydistill.config import Config
from raydistill.data.order import steps_per_epoch
from raydistill.data.shards import STUDENT_SPLITS
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.models import ModelSource, check_length, check_task, find_model, label_order, refuse_adapter
from raydistill.record.run import Run
from raydistill.stages.adapted import check_adapters, check_quantising_device
from raydistill.stages.calibration import calibration_plan, teacher_temperature
from raydistill.stages.cluster import Resources, check_precision, share_for_actors, share_for_training
from raydistill.stages.feature_cache import check_lent_features, features_plan
from raydistill.stages.feature_cost import FeatureCost
from raydistill.stages.features import feature_terms
from raydistill.stages.prepare import mask_token
from raydistill.stages.progress import size
from raydistill.stages.teach import cache_plan, teacher_dtype, teacher_source
from raydistill.stages.trainer import settings_of, training_plan
from raydistill.students.sizes import check_architecture
from raydistill.students.skeleton import student_skeleton
from raydistill.students.vocabulary import check_trimmable

CODEC_BYTES = {"dense-float32": (4, 0), "dense-float16": (2, 0), "dense-int8": (1, 4)}


def check_models(config: Config, run: Run, labels: list[str]) -> None:
    """Teacher and student against the data. Raises UserError for the first thing that does not fit."""
    folder = find_model("teacher.model", config.teacher.model, config.teacher.revision)
    refuse_adapter("teacher.model", folder)
    tokenizer = load_tokenizer(folder, "teacher.model")
    check_length("the teacher", folder, config.data.max_length)
    if config.teacher.fine_tune is None:
        label_order("teacher.model", folder, labels)
        check_task("teacher.model", folder, config.task)
    elif run.lender and run.plan("teacher") is None:
        raise UserError(
            "teacher.fine_tune: the run in teacher.cache_from did not fine-tune its teacher. Remove the section"
        )
    for name in ("temperature", "temperature_end"):
        temperature = getattr(config.train.loss, name)
        if temperature is not None and not CODECS[config.teacher.codec].covers(temperature):
            raise UserError(f"train.loss.{name}: {config.teacher.codec} does not cover {temperature}")
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
    if config.student.init != "config":
        length = config.data.max_length
        student_skeleton(config.student, teacher_folder=folder, labels=labels, max_length=length)
    feature_terms(config, folder)
    if config.student.lora:
        check_adapters(config, folder, labels)
    check_lent_features(config, run, folder)


def _check_mask_token(config: Config, tokenizer: Any) -> None:
    """Augmented texts hold the teacher's mask token, which the student's tokenizer must know as its own."""
    token = mask_token(config)
    if token is not None and tokenizer.mask_token != token:
        raise UserError(
            f"data.augment.mask: texts are masked with the teacher's {token!r}, the student's mask token is"
            f" {tokenizer.mask_token!r}. Set data.augment.mask=0, or choose a student with the teacher's tokenizer"
        )


def check_resources(config: Config, stages: tuple[str, ...], resources: Resources) -> None:
    """Every stage's share of the cluster. Raises UserError for what would wait for ever."""
    if "teach" in stages or "evaluate" in stages:
        share_for_actors(resources, actors=config.teacher.actors, cpus_per_actor=config.teacher.cpus_per_actor)
    roles = ["teacher"] if "teach" in stages and config.teacher.fine_tune else []
    roles += ["student"] if "train" in stages else []
    for role in roles:
        settings, section = settings_of(config, role)
        share_for_training(resources, settings, section)
        check_precision(resources, settings.precision, section)
    if "student" in roles or ("evaluate" in stages and config.evaluate.control):
        check_quantising_device(config.student, resources)


def check_plans(config: Config, run: Run, stages: tuple[str, ...], resources: Resources) -> None:
    """Compares every plan that can be known now with the one that stands, so that nothing is written for a refused one.

    A plan can be known once the parts that it is made from are complete. Raises UserError for the first that differs.
    """
    data = run.complete("data")
    if data is None or stages == ("prepare",):
        return
    if config.teacher.fine_tune is not None and not run.lender:
        start = ModelSource("teacher.model", config.teacher.model, config.teacher.revision)
        if "teach" in stages:
            run.check("teacher", training_plan("teacher", config, run, resources, start))
        if run.complete("teacher") is None:
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
    if "train" in stages and made:
        run.check("student", training_plan("student", config, run, resources, teacher))
    if "evaluate" in stages and config.evaluate.control:
        run.check("control", training_plan("control", config, run, resources, teacher))


@dataclass(frozen=True)
class Cost:
    """What a run will do."""

    rows: dict[str, int]
    teacher_forwards: int
    cache_bytes: int
    steps: dict[str, int]
    features: FeatureCost | None = None

    def lines(self) -> list[str]:
        steps = ", ".join(f"{name} {count:,}" for name, count in self.steps.items())
        return [
            "rows: " + ", ".join(f"{count:,} {split}" for split, count in self.rows.items()),
            f"teacher forwards for the cache: {self.teacher_forwards:,} rows, once each",
            f"cache: {size(self.cache_bytes)}",
            f"optimiser steps at most: {steps}",
            *(self.features.lines() if self.features else []),
        ]


def cost(config: Config, rows: dict[str, int], classes: int, features: FeatureCost | None = None) -> Cost:
    """The cost of a run over these rows."""
    per_class, per_row = CODEC_BYTES[config.teacher.codec]
    forwards = sum(count for split, count in rows.items() if split != "test")
    learnt = sum(rows.get(split, 0) for split in STUDENT_SPLITS)
    steps = {}
    for role in ("teacher", "student", "control"):
        if (role == "teacher" and config.teacher.fine_tune is None) or (
            role == "control" and not config.evaluate.control
        ):
            continue
        settings, _ = settings_of(config, role)
        of_role = rows["train"] if role == "teacher" else learnt
        steps[role] = settings.epochs * steps_per_epoch(of_role, settings.batch_size)
    return Cost(rows, forwards, forwards * (classes * per_class + per_row), steps, features)
