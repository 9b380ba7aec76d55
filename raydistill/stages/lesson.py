"""What one rank of a training learns, and from what: the model, its rows, its loss and how it is validated.

The loop (`stages/loop.py`) knows steps, checkpoints and curves, and no task: that is here for classifiers, and in
`stages/language/lesson.py` for language models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from raydistill.adapters import frozen_parameters
from raydistill.data.loader import Batch
from raydistill.data.order import steps_per_epoch
from raydistill.depths import parameter_depths
from raydistill.losses.objective import Objective
from raydistill.losses.term_gradients import gradient_squares
from raydistill.models.configuration import set_task
from raydistill.models.saving import save_model
from raydistill.stages.adapted import save_adapted, with_adapters
from raydistill.stages.job import TrainingJob, build_model, class_objective, open_split, with_features
from raydistill.stages.meter import Meter
from raydistill.stages.steps import EAGER_LENGTH
from raydistill.stages.validation import validation_metrics
from raydistill.taught import STUDENT_PREFIX, TaughtStudent, student_weights

Steps = Iterator[tuple[int, Callable[[], Iterator[Any]]]]
Parts = dict[str, torch.Tensor]


class Lesson(Protocol):
    """What the loop asks of a task. Built on every rank alike, before the process's engine."""

    model: torch.nn.Module  # as the engine trains it
    frozen: frozenset[str]  # parameters that no checkpoint holds
    depths: Mapping[str, int]  # of the parameters that a schedule unfreezes; empty without one
    rows: int  # of what the loss is a mean over: rows, or tokens
    unit: str  # its name in the curves
    per_pass: int  # steps over all rows
    per_epoch: int  # steps that an epoch counts

    def steps(self, *, epoch: int, first_step: int, rank: int, world: int) -> Steps:
        """(global count of rows, this rank's micro-batches) of every step of an epoch from one on."""
        ...

    def loss(self, engine: Any, batch: Any, objective: Any, meter: Meter | None) -> tuple[torch.Tensor, Parts]:
        """The sum over a micro-batch's rows and its parts; 0, with the graph of a forward, for one without rows.

        With a meter the parts' gradients are looked at, where the task can.
        """
        ...

    def validation(self, engine: Any) -> dict[str, float]:
        """The metrics of the validation split. Collective."""
        ...

    def publish(self, weights: dict[str, torch.Tensor], folder: Path, *, place: str) -> Any:
        """Writes the model with these weights in Hugging Face form; the model. `place` is where it will stand."""
        ...

    def close(self) -> None: ...


class ClassLesson:
    """A classifier: it learns rows, each with its label, from the teacher's logits of them, and from its features."""

    unit = "rows"

    def __init__(self, job: TrainingJob, device: torch.device) -> None:
        self._job, self._device = job, device
        self._objective = class_objective(job)
        model, self.tokenizer = build_model(job)
        self.model: torch.nn.Module = model
        set_task(model, job.config.task)
        if device.type == "cpu" and job.config.data.max_length <= EAGER_LENGTH:
            model.set_attn_implementation("eager")
        self._lora = job.config.student.lora if job.role != "teacher" else None
        if self._lora:
            self.model = model = with_adapters(model, self._lora, job.settings.seed, device)
        self.depths: Mapping[str, int] = parameter_depths(model, f"{job.section}.unfreeze") if job.unfreeze else {}
        self._teacher = None
        if self._objective.features:
            self.model, self._teacher = with_features(job, model, self.tokenizer, device)
            self.depths = {STUDENT_PREFIX + name: depth for name, depth in self.depths.items()}
        if job.settings.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()  # type: ignore[operator]
        self.frozen: frozenset[str] = frozen_parameters(self.model) if self._lora else frozenset()
        self._train, self._validation = (
            open_split(job, splits, self.tokenizer) for splits in (job.splits, ("validation",))
        )
        self.rows = self._train.rows
        self.per_pass = steps_per_epoch(self.rows, job.settings.batch_size)
        self.per_epoch = steps_per_epoch(job.epoch_rows, job.settings.batch_size)

    def steps(self, *, epoch: int, first_step: int, rank: int, world: int) -> Steps:
        settings = self._job.settings
        return self._train.training_steps(
            seed=settings.seed, epoch=epoch, batch_size=settings.batch_size, first_step=first_step, rank=rank,
            world=world, accumulation=settings.accumulation, by_length=settings.group_by_length,
        )  # fmt: skip

    def loss(self, engine: Any, batch: Batch, objective: Objective, meter: Meter | None) -> tuple[torch.Tensor, Parts]:
        logits, features = engine.outputs(batch.inputs)
        if not batch.rows:
            return torch.as_tensor(sum((feature.sum() for feature in features), logits.sum())) * 0, {}
        labels = batch.labels_N.to(self._device)
        targets = batch.teacher.to(self._device) if batch.teacher and objective.needs_teacher else None
        beside: dict[str, Any] = {}
        if objective.features and targets is not None:
            assert isinstance(self.model, TaughtStudent)
            if self._teacher is not None:
                targets = replace(targets, features=self._teacher.features(batch.inputs))
            mask = batch.inputs["attention_mask"].to(self._device)
            beside = {"student_features": self.model.grouped(features), "mask_NL": mask}
        if meter is not None:
            meter.add_gradients(gradient_squares(objective, logits, labels, targets, **beside), batch.rows)
        return objective(logits, labels, targets, **beside)

    def validation(self, engine: Any) -> dict[str, float]:
        return validation_metrics(engine, self._validation, classes=len(self._job.labels))

    def publish(self, weights: dict[str, torch.Tensor], folder: Path, *, place: str) -> Any:
        job, model, length = self._job, self.model, self._job.config.data.max_length
        if isinstance(model, TaughtStudent):
            model, weights = model.student, student_weights(weights)
        if self._lora:
            base = build_model(job, alone=True)[0]
            return save_adapted(
                base, self.tokenizer, weights, folder, self._lora, job.settings.seed, self._device, max_length=length,
                place=place,
            )  # fmt: skip
        save_model(model, self.tokenizer, weights, folder, max_length=length)
        return model

    def close(self) -> None:
        for split in (self._train, self._validation):
            split.close()
        if self._teacher is not None:
            self._teacher.close()
        if isinstance(self.model, TaughtStudent):
            self.model.close()
