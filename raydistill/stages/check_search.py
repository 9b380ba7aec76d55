"""What can be checked of a search before a worker starts: every corner of its space as a training of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from raydistill.config.points import corners, with_point
from raydistill.config.run import Config
from raydistill.config.section import identity
from raydistill.errors import UserError
from raydistill.losses.cached_features import serving
from raydistill.models.folders import find_model
from raydistill.record.fingerprint import digest
from raydistill.record.run import Run
from raydistill.stages.cluster import Resources, share_for_trials
from raydistill.stages.feature_cache import needed_features
from raydistill.stages.fusable import why_not_fused, why_not_together
from raydistill.stages.search_cost import count_groups
from raydistill.stages.training_stages import training_stages
from raydistill.stages.trial import trial_config
from raydistill.stages.tune import check_count, tune_plan
from raydistill.students.build import student_shape


class Checks(Protocol):
    """What a task checks of a run's models, and of what its student is trained with."""

    @property
    def check_models(self) -> Callable[[Config, Run, list[str]], None]: ...

    @property
    def check_training(self) -> Callable[[Config, Path, list[str]], None]: ...


def check_search(config: Config, run: Run, labels: list[str], checks: Checks) -> None:
    """Every corner of the space against data, cache and models, as a training of its own would be checked.

    Raises UserError, naming the values, for the first that does not fit.
    """
    assert config.tune is not None
    teacher = find_model("teacher.model", config.teacher.model, config.teacher.revision)
    kept = needed_features(config, teacher)
    students: set[str] = {digest(identity(config.student))}
    for point in corners(config.tune.space):
        made = with_point(config, point)
        try:
            if (student := digest(identity(made.student))) not in students:
                students.add(student)
                checks.check_models(made, run, labels)
            checks.check_training(made, teacher, labels)
            _check_trial(made, kept, teacher)
            _check_batch(trial_config(config, point))
            if config.tune.fused is True:
                _check_fused(trial_config(config, point, fused=True), teacher)
        except UserError as error:
            values = ", ".join(f"{name}={value}" for name, value in point.items())
            raise UserError(f"tune.space: {values}: {error}") from None
    if config.tune.fused is True and count_groups(config, teacher) == 0:
        several = [trial_config(config, point, fused=True) for point in itertools.islice(corners(config.tune.space), 2)]
        reason = why_not_together(several) or "there is one"
        raise UserError(f"tune.fused: true, and no two trials can be trained together: {reason}. Set tune.fused=auto")


def _check_fused(config: Config, teacher: Path) -> None:
    """That a trial can be a member of a stack, where tune.fused asks for it."""
    if config.train.workers > 1:
        raise UserError(
            f"tune.fused: true, and trials of {config.train.workers} workers are not fused. Set tune.workers=1, or"
            " tune.fused=auto"
        )
    reason = why_not_fused(config, student_shape(config.student, teacher).model_type)
    if reason is not None:
        raise UserError(f"tune.fused: true, and {reason}. Change it, or set tune.fused=auto")


def _check_batch(trial: Config) -> None:
    """That every worker of a trial has a part of each batch: it may have more than the winner's training."""
    train = trial.train
    smallest = min((stage.batch_size or train.batch_size for stage in train.stages or ()), default=train.batch_size)
    if smallest < train.workers * train.accumulation:
        raise UserError(
            f"tune.workers: found {train.workers}, and a batch of {smallest} rows in {train.accumulation}"
            " micro-batches for each is not enough for so many. Lower it, or raise train.batch_size"
        )


def _check_trial(config: Config, kept: tuple[str, ...], teacher: Any) -> None:
    """What holds for trials alone."""
    if config.train.precision == "fp16":
        raise UserError("train.precision: found fp16; trials are trained in bf16 or fp32. Use one of them, or auto")
    stages = training_stages("student", config)
    for stage in stages:
        loss = stage.settings.loss
        if stage.own_teacher:
            raise UserError(
                f"{stage.section}.teacher: previous, and a student of every trial would score all rows, where the"
                " teacher of a search has done so once. Remove it, or the section tune"
            )
        if loss.features and loss.features_from != "cache":
            raise UserError(
                f"{stage.loss_section}.features: the teacher would run in every trial. Set {stage.loss_section}"
                ".features_from=cache, and name in train.loss.features all that trials need"
            )
    if (chosen := stages[-1].settings.choose) != config.train.choose:
        raise UserError(
            f"{stages[-1].section}.choose: found {chosen}, and a search chooses by train.choose, which is"
            f" {config.train.choose}. Set that, and leave this one out"
        )
    missing = [name for name in needed_features(config, teacher) if serving(name, kept) is None]
    if missing:
        raise UserError(
            f"train.loss.features: needs {', '.join(missing)} of the cache, which train.loss.features outside the space"
            " does not ask for. Name there all that trials need"
        )


def check_search_stands(config: Config, run: Run, stages: tuple[str, ...], resources: Resources) -> None:
    """The search against the cluster, and against the one that stands in the run. Raises UserError."""
    if not {"tune", "train", "evaluate"} & set(stages):
        return
    if "tune" in stages:
        share_for_trials(config, resources)
    features = not config.train.caches_features or run.complete("features") is not None
    if run.complete("data") is not None and run.complete("cache") is not None and features:
        check_count(config, run)
        run.check("tune", tune_plan(config, run, resources))
