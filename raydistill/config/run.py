"""A whole run: every section, and what must hold between them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from raydistill.config.data import Data
from raydistill.config.evaluate import Evaluate
from raydistill.config.export import Export
from raydistill.config.language import check_language, check_other_task, with_defaults
from raydistill.config.loss import KINDS_OF_SETS, Loss
from raydistill.config.section import PLAIN_NAME, Section
from raydistill.config.student import Student
from raydistill.config.teacher import Teacher
from raydistill.config.train import Train
from raydistill.config.tune import Tune


class Cluster(Section):
    """Which Ray cluster; under `ray job submit` the job's own cluster is used whatever stands here."""

    address: str = Field(default="local", min_length=1, description="local, or an address that ray.init takes")
    cpus: int | None = Field(
        default=None, ge=1, le=4096, description="of a local cluster; absent: what the process may use"
    )


def _check_loss_of_sets(loss: Loss) -> None:
    if loss.kind not in KINDS_OF_SETS:
        raise ValueError(
            f"train.loss.kind: {loss.kind} compares classes with each other and task: multi_label asks"
            f" for each by itself; use {', '.join(KINDS_OF_SETS)}"
        )
    if loss.standardise:
        raise ValueError("train.loss.standardise moves the logit at which task: multi_label says yes or no; remove it")


class Config(Section):
    """One run."""

    name: str = Field(description="the run's folder below storage")
    storage: str = Field(default="runs", min_length=1, description="a folder, s3://bucket/prefix or another fsspec URL")
    task: Literal["classification", "multi_label", "causal_lm"] = Field(
        default="classification",
        description="multi_label: a row may have several labels or none; causal_lm: the next token",
    )
    data: Data
    teacher: Teacher
    student: Student = Student()
    train: Train = Train()
    tune: Tune | None = Field(default=None, description="absent: no search")
    export: Export | None = Field(default=None, description="absent: no files to deploy")
    evaluate: Evaluate = Evaluate()
    cluster: Annotated[Cluster, Field(json_schema_extra={"speed": True})] = Cluster()

    @property
    def trial_workers(self) -> int:
        """How many workers train a trial of the search."""
        asked = None if self.tune is None else self.tune.workers
        return self.train.workers if asked is None else asked

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_task(cls, tree: Any) -> Any:
        return with_defaults(tree)

    @model_validator(mode="after")
    def _codec_has_features(self) -> Config:
        codec = type(self.teacher).model_fields["features_codec"].default
        if self.teacher.features_codec != codec and not self.train.caches_features:
            raise ValueError("teacher.features_codec means nothing without train.loss.features_from=cache; remove it")
        return self

    @model_validator(mode="after")
    def _rows_fit_student(self) -> Config:
        positions = self.student.max_positions
        if positions is not None and positions < self.data.max_length:
            raise ValueError(
                f"student.max_positions {positions} is below data.max_length {self.data.max_length}, the tokens that a"
                " row may have; raise the one or lower the other"
            )
        if self.student.vocabulary_min_count > 1 and self.train.loss.features_from == "cache":
            raise ValueError(
                f"student.vocabulary_min_count {self.student.vocabulary_min_count} cuts rows of train into other tokens"
                " than those whose features are in the cache; set it to 1, or train.loss.features_from to teacher"
            )
        return self

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not PLAIN_NAME.fullmatch(value) or value.upper() in {"CON", "PRN", "AUX", "NUL"}:
            raise ValueError("a run name is a plain name of letters, digits, '.', '_' and '-', at most 64, no path")
        return value

    @model_validator(mode="after")
    def _settings_fit_task(self) -> Config:
        tuning = self.teacher.fine_tune
        if self.task == "causal_lm":
            check_language(self)
            return self
        check_other_task(self)
        metrics = {"train": self.train.metric} | ({"teacher.fine_tune": tuning.metric} if tuning else {})
        metrics |= {"tune": self.tune.metric} if self.tune else {}
        metrics |= {f"train.stages[{n}]": stage.metric for n, stage in enumerate(self.train.stages or ())}
        if self.task == "classification":
            for section, metric in metrics.items():
                if metric == "micro_f1":
                    raise ValueError(f"{section}.metric: micro_f1 is accuracy where a row has one label; use accuracy")
            if self.data.label_separator != type(self.data).model_fields["label_separator"].default:
                raise ValueError("data.label_separator means nothing with task: classification; remove it")
            return self
        for loss in self.train.losses:
            _check_loss_of_sets(loss)
        return self

    @model_validator(mode="after")
    def _comparisons_fit_the_run(self) -> Config:
        for name, one in self.evaluate.sets.items():
            if one.out_of_domain and self.task == "multi_label":
                raise ValueError(
                    f"evaluate.sets.{name}.out_of_domain means nothing with task: multi_label, where a row of the task"
                    " may have no label either; remove it"
                )
        if self.evaluate.quantise_teacher and (self.teacher.members or self.teacher.fine_tune_seeds):
            raise ValueError("evaluate.quantise_teacher: found with several teachers; it is for one, remove it")
        return self

    @model_validator(mode="after")
    def _stages_go_on_from_whole_models(self) -> Config:
        if self.student.lora and not self.student.lora.merge and len(self.train.stages or ()) > 1:
            raise ValueError(
                "train.stages go on from whole models, and student.lora.merge: false saves adapters. Set it to true, or"
                " remove the stages"
            )
        return self

    @model_validator(mode="after")
    def _adapters_leave_nothing_to_unfreeze(self) -> Config:
        if self.student.lora and self.train.unfreezes:
            raise ValueError(
                "train.unfreeze: found with student.lora, whose encoder stays frozen; remove the one or the other"
            )
        return self

    @model_validator(mode="after")
    def _rows_without_labels_have_a_teacher(self) -> Config:
        if self.task == "causal_lm":  # whose rows all have a next token
            return self
        data, learns = self.data, any(loss.has_teacher for loss in self.train.losses)
        asked = {
            "unlabelled": data.unlabelled, "keep_unlabelled": data.keep_unlabelled,
            "augment": data.augment and not data.augment.keep_labels,
        }  # fmt: skip
        if (name := next((name for name, value in asked.items() if value), None)) and not learns:
            raise ValueError(
                f"data.{name} asks for rows without labels, of which train.loss.alpha: 0 learns nothing; raise alpha,"
                " or remove the setting"
            )
        return self

    @model_validator(mode="after")
    def _excluded_rows_had_a_teacher(self) -> Config:
        if self.train.exclude is not None and not any(loss.has_teacher for loss in self.train.losses):
            raise ValueError(
                "train.exclude: nothing is learned from the teacher with train.loss.alpha: 0; raise alpha, or remove"
                " exclude"
            )
        return self

    @model_validator(mode="after")
    def _quantised_weights_stay_whole(self) -> Config:
        if self.student.lora and self.student.lora.quantised and self.train.deepspeed.zero_stage == 3:
            raise ValueError(
                "student.lora.quantised: found nf4 with train.deepspeed.zero_stage 3, which cuts weights up; use 2"
            )
        return self
