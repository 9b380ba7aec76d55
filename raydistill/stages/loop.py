"""The training loop that every worker runs: teacher, student and control alike. It knows no Ray.

A step's loss is a sum over the global batch divided once by its global count, so that workers, accumulation and uneven
batches do not change it. Order of rows, dropout and learning rate are functions of the step, so that a training that
was stopped at any step goes on as if it had not been.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from raydistill.adapters import frozen_parameters, load_trained
from raydistill.data.loader import Batch
from raydistill.data.order import steps_per_epoch
from raydistill.depths import parameter_depths
from raydistill.engine import Engine
from raydistill.errors import UserError
from raydistill.losses.objective import Objective
from raydistill.losses.term_gradients import gradient_squares
from raydistill.models import (
    count_parameters,
    save_classifier,
    set_task,
)
from raydistill.plain_engine import PlainEngine
from raydistill.record.commit import commit_folder
from raydistill.record.store import naming, open_store
from raydistill.stages.adapted import save_adapted, with_adapters
from raydistill.stages.checkpoints import Checkpoint, Checkpoints, State
from raydistill.stages.curves import WatchedCurves
from raydistill.stages.job import TrainingJob, build_model, open_split, with_features
from raydistill.stages.meter import Meter, broken_step
from raydistill.stages.ranks import all_reduce, barrier, from_rank_zero, in_group, rank_and_world
from raydistill.stages.steps import EAGER_LENGTH, dropout_seed, learning_rate, not_finite, training_device
from raydistill.stages.unfreezing import thaw_steps
from raydistill.stages.validation import validation_metrics
from raydistill.stages.watch import Watch, watched_part
from raydistill.taught import STUDENT_PREFIX, TaughtStudent, student_weights

LOWER_IS_BETTER = ("nll", "kl")


def run_training(
    job: TrainingJob, *, post: Callable[[dict[str, Any]], None], stopped: Callable[[], bool]
) -> dict[str, Any]:
    """Trains to the end, to early stopping or to a request to stop; {"outcome": "done" | "stopped", "step": …}.

    torch.distributed is initialised by the caller; without it the training is this process's alone and takes no
    DeepSpeed. Rank 0 writes checkpoints, curves and the finished model, and posts
    progress. Raises UserError, on every rank alike, for a loss that is not finite.
    """
    rank = TrainingRank(job, post, stopped)
    try:
        return rank.train()
    finally:
        rank.close()


class TrainingRank:
    """One rank of a training. `train` goes to its end, `validations` from one validation to the next."""

    def __init__(self, job: TrainingJob, post: Callable[[dict[str, Any]], None], stopped: Callable[[], bool]) -> None:
        self.job, self.settings = job, job.settings
        self.rank, self.world = rank_and_world()
        self.device = training_device()
        self.store = open_store(job.run_url)
        self.post, self.stopped = post, stopped
        self.checkpoints = Checkpoints(self.store, job.folder, job.fingerprint)
        self.model, self.tokenizer = build_model(job)
        set_task(self.model, job.config.task)
        if self.device.type == "cpu" and job.config.data.max_length <= EAGER_LENGTH:
            self.model.set_attn_implementation("eager")
        self.lora = job.config.student.lora if job.role != "teacher" else None
        if self.lora:
            self.model = with_adapters(self.model, self.lora, job.settings.seed, self.device)
        depths = parameter_depths(self.model, f"{job.section}.unfreeze") if job.unfreeze else {}
        self.teacher = None
        if job.objective.features:
            self.model, self.teacher = with_features(job, self.model, self.tokenizer, self.device)
        if job.settings.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.frozen = frozen_parameters(self.model) if self.lora else frozenset()
        self.train_split, self.validation_split = (
            open_split(job, splits, self.tokenizer) for splits in (job.splits, ("validation",))
        )
        checkpoint = self._agree_on_checkpoint()
        self.state = checkpoint.state if checkpoint else State()
        if checkpoint:
            load_trained(self.model, checkpoint.weights(), self.frozen)
        self.model.train()
        self.per_pass = steps_per_epoch(self.train_split.rows, job.settings.batch_size)
        self.per_epoch = steps_per_epoch(job.epoch_rows, job.settings.batch_size)
        self.total = self.per_epoch * job.settings.epochs
        engine = Engine if in_group() else PlainEngine
        self.engine = engine(
            self.model, job.settings, precision=job.precision, device=self.device, frozen=self.frozen,
            thaws=self._thaws(depths),
        )  # fmt: skip
        if checkpoint:
            self.engine.restore_optimizer(checkpoint.optimizer_state(), self.state.step)
            self.post({"going_on_from": self.state.step})
        self.watched = watched_part(job.objective)
        self.curves = None
        if self.rank == 0:
            settings = f"{job.section}.learning_rate {job.settings.learning_rate:g}, precision {job.precision}"
            watch = Watch(self.watched, settings, steady="temperature" not in job.courses) if self.watched else None
            self.curves = WatchedCurves(self.store, job.folder, self.state.step, watch, post)
        self.meter = Meter(job.objective.part_names, self.device)
        self.looks_at_gradients = self.has_stopped = False

    def _thaws(self, depths: dict[str, int]) -> dict[str, int]:
        """The step from which each of the student's parameters trains, by its name here."""
        prefix = STUDENT_PREFIX if isinstance(self.model, TaughtStudent) else ""
        steps = thaw_steps(self.job.unfreeze, depths, self.total) if depths else {}
        return {prefix + name: step for name, step in steps.items()}

    def _agree_on_checkpoint(self) -> Checkpoint | None:
        newest = from_rank_zero(self.checkpoints.newest() if self.rank == 0 else None)
        return None if newest is None else self.checkpoints.load(newest)

    def train(self) -> dict[str, Any]:
        for _ in self.validations():
            pass
        if self.has_stopped:
            return {"outcome": "stopped", "step": self.state.step}
        if self.rank == 0:
            self._publish()
        return {"outcome": "done", "step": self.state.step}

    def validations(self) -> Iterator[dict[str, float]]:
        """Trains on; the metrics of every validation, once its checkpoint is committed."""
        self.post({"rows": self.train_split.rows, "steps": self.total, "per_epoch": self.per_epoch})
        while self.state.step < self.total and not self._out_of_patience():
            for global_rows, micro_batches in self._steps_of_epoch():
                self._step(global_rows, list(micro_batches()))
                if self._is_due(self.settings.validate_every or self.per_epoch) or self.state.step == self.total:
                    yield self._validate()
                elif self.settings.checkpoint_every and self._is_due(self.settings.checkpoint_every):
                    self._save()
                if self._should_stop():
                    self._save()
                    self.has_stopped = True
                    return
                if self._out_of_patience() or self.state.step == self.total:
                    break

    def _steps_of_epoch(self) -> Any:
        return self.train_split.training_steps(
            seed=self.settings.seed,
            epoch=self.state.step // self.per_pass,
            batch_size=self.settings.batch_size,
            first_step=self.state.step % self.per_pass,
            rank=self.rank,
            world=self.world,
            accumulation=self.settings.accumulation,
            by_length=self.settings.group_by_length,
        )

    def _step(self, global_rows: int, batches: list[Batch]) -> None:
        started = time.perf_counter()
        self.engine.begin_step(self.state.step)
        torch.manual_seed(dropout_seed(self.settings.seed, self.state.step, self.rank))
        objective = self.job.objective
        if self.job.courses:
            objective = replace(objective, **self._numbers(self.state.step))
        due = self.state.step + 1
        self.looks_at_gradients = due % self.settings.log_every == 0 or due % self.per_epoch == 0
        for batch in batches:
            loss, parts = self._loss(batch, objective)
            if batch.rows:
                self.meter.add(loss.detach(), parts, batch.rows)
            self.engine.backward(loss, global_rows)
        rate = learning_rate(self.settings, self.state.step, self.total)
        self.engine.step(rate)
        self.state.step += 1
        self.state.seconds += time.perf_counter() - started
        self.meter.end_step(time.perf_counter() - started)
        if self.state.step % self.settings.log_every == 0 or self.state.step % self.per_epoch == 0:
            self._report(rate)

    def _numbers(self, step: int) -> dict[str, float]:
        """The objective's numbers that change, at a step."""
        return {name: course.at(step, self.total) for name, course in self.job.courses.items()}

    def _loss(self, batch: Batch, objective: Objective) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The sum over a micro-batch's rows and its parts; 0, with the graph of a forward, for one without rows."""
        logits, features = self.engine.outputs(batch.inputs)
        if not batch.rows:
            return sum((feature.sum() for feature in features), logits.sum()) * 0, {}
        labels = batch.labels_N.to(self.device)
        targets = batch.teacher.to(self.device) if batch.teacher and objective.needs_teacher else None
        beside: dict[str, Any] = {}
        if objective.features and targets is not None:
            if self.teacher is not None:
                targets = replace(targets, features=self.teacher.features(batch.inputs))
            mask = batch.inputs["attention_mask"].to(self.device)
            beside = {"student_features": self.model.grouped(features), "mask_NL": mask}
        if self.looks_at_gradients:
            self.meter.add_gradients(gradient_squares(objective, logits, labels, targets, **beside), batch.rows)
        return objective(logits, labels, targets, **beside)

    def _report(self, rate: float) -> None:
        """Sums the last steps over all ranks, checks them and adds a point to the curves."""
        sums, seconds = self.meter.take()
        squares = self.meter.take_gradients()
        all_reduce(sums)
        all_reduce(squares)
        self._check_finite(sums)
        values, notes = self.meter.point(sums, squares, self.state.step, self.watched)
        values |= {
            "learning_rate": rate,
            **self._numbers(self.state.step - 1),
            **({"trained_parameters": self.engine.trained_parameters} if self.job.unfreeze else {}),
            "grad_norm": self.engine.grad_norm,
            "rows_per_second": self.meter.speed(sums, seconds),
        }
        if self.curves:
            self.curves.add(self.state.step, self.state.step / self.per_epoch, values, notes=notes)
        self.post({"step": self.state.step, **values})

    def _check_finite(self, sums: torch.Tensor) -> None:
        if (step := broken_step(sums, self.state.step)) is not None:
            raise UserError(not_finite(self.job, step))

    def _validate(self) -> dict[str, float]:
        if self.meter.steps:
            self._report(learning_rate(self.settings, self.state.step - 1, self.total))
        values = validation_metrics(self.engine, self.validation_split, classes=len(self.job.labels))
        value = values[self.job.metric]
        better = self.state.best_value is None or (
            value < self.state.best_value if self.job.metric in LOWER_IS_BETTER else value > self.state.best_value
        )
        self.state.last_value = value
        if better:
            self.state.best_value, self.state.best_step = value, self.state.step
        self.state.validations_without_gain = 0 if better else self.state.validations_without_gain + 1
        if self.curves:
            self.curves.add(self.state.step, self.state.step / self.per_epoch, values, group="validation")
        self.post({"step": self.state.step, "validation": values, "best": better})
        self._save()
        return values

    def _save(self) -> None:
        if self.meter.steps:
            self._report(learning_rate(self.settings, self.state.step - 1, self.total))
        weights, optimizer = self.engine.weights(), self.engine.optimizer_state()
        if self.rank == 0:
            assert self.curves is not None
            self.curves.save()
            self.checkpoints.save(self.state, weights, optimizer)
        barrier()

    def _is_due(self, every: int) -> bool:
        return self.state.step % every == 0

    def _out_of_patience(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.state.validations_without_gain >= patience

    def _should_stop(self) -> bool:
        """Whether a stop was asked for; with several ranks they agree on it every few steps."""
        if self.world == 1:
            return self.stopped()
        if not self._is_due(self.settings.log_every):
            return False
        wish = torch.tensor([float(self.rank == 0 and self.stopped())], device=self.device)
        all_reduce(wish)
        return bool(wish.item())

    def _publish(self) -> None:
        """Writes the checkpoint that was asked for, the best or the last one, as a Hugging Face folder."""
        step, value = self.state.best_step, self.state.best_value
        if self.settings.choose == "last":
            step, value = self.state.step, self.state.last_value
        chosen = self.checkpoints.load(step)
        staged = self.store.staging(self.job.product)
        staged.mkdir(parents=True)
        length = self.job.config.data.max_length
        with naming(staged):
            model, weights = self.model, chosen.weights()
            if isinstance(model, TaughtStudent):
                model, weights = model.student, student_weights(weights)
            if self.lora:
                base, place = build_model(self.job, alone=True)[0], self.store.where(self.job.product)
                model = save_adapted(
                    base, self.tokenizer, weights, staged, self.lora, self.job.settings.seed, self.device,
                    max_length=length, place=place,
                )  # fmt: skip
            else:
                save_classifier(model, self.tokenizer, weights, staged, max_length=length)
        facts = {
            "metric": self.job.metric,
            "value": value,
            "step": step,
            "steps": self.state.step,
            "seconds": round(self.state.seconds, 1),
            "parameters": count_parameters(model),
            "precision": self.job.precision,
            **({"stages_before": dict(self.job.stages_before)} if self.job.stages_before else {}),
        }
        commit_folder(self.store, staged, self.job.product, self.job.fingerprint, facts)

    def close(self) -> None:
        if self.curves:
            self.curves.close()
        for split in (self.train_split, self.validation_split):
            split.close()
        self.engine.close()
        if self.teacher is not None:
            self.teacher.close()
        if isinstance(self.model, TaughtStudent):
            self.model.close()
