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

from raydistill.adapters import load_trained
from raydistill.engine import Engine
from raydistill.errors import UserError
from raydistill.models.loading import count_parameters
from raydistill.plain_engine import PlainEngine
from raydistill.record.commit import commit_folder
from raydistill.record.store import naming, open_store
from raydistill.stages.checkpoints import Checkpoint, Checkpoints, State
from raydistill.stages.curves import WatchedCurves
from raydistill.stages.job import TrainingJob
from raydistill.stages.language.lesson import LanguageLesson
from raydistill.stages.lesson import ClassLesson, Lesson
from raydistill.stages.meter import Meter, broken_step
from raydistill.stages.ranks import all_reduce, barrier, from_rank_zero, in_group, rank_and_world
from raydistill.stages.steps import dropout_seed, learning_rate, not_finite, training_device
from raydistill.stages.unfreezing import thaw_steps
from raydistill.stages.watch import Watch, watched_part

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
        self.lesson = lesson_of(job, self.device)
        self.model = self.lesson.model
        checkpoint = self._agree_on_checkpoint()
        self.state = checkpoint.state if checkpoint else State()
        if checkpoint:
            load_trained(self.model, checkpoint.weights(), self.lesson.frozen)
        self.model.train()
        self.per_pass, self.per_epoch = self.lesson.per_pass, self.lesson.per_epoch
        self.total = self.per_epoch * job.settings.epochs
        engine = Engine if in_group() else PlainEngine
        self.engine = engine(
            self.model, job.settings, precision=job.precision, device=self.device,
            frozen=self.lesson.frozen, thaws=self._thaws(),
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
        self.has_stopped = False
        self.first_step_at: float | None = None  # when the first step of this process began, seconds since 1970

    def _thaws(self) -> dict[str, int]:
        """The step from which each parameter trains, by its name here, where a schedule says so."""
        depths = self.lesson.depths
        return thaw_steps(self.job.unfreeze, depths, self.total) if depths else {}

    def _agree_on_checkpoint(self) -> Checkpoint | None:
        newest = from_rank_zero(self.checkpoints.newest() if self.rank == 0 else None)
        return None if newest is None else self.checkpoints.load(newest)

    def train(self) -> dict[str, Any]:
        for _ in self.validations():
            pass
        if self.has_stopped:
            return {"outcome": "stopped", "step": self.state.step}
        if self.rank == 0:
            self.publish()
        return {"outcome": "done", "step": self.state.step}

    def validations(self) -> Iterator[dict[str, float]]:
        """Trains on; the metrics of every validation, once its checkpoint is committed."""
        self.post({"rows": self.lesson.rows, "steps": self.total, "per_epoch": self.per_epoch})
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
        return self.lesson.steps(
            epoch=self.state.step // self.per_pass, first_step=self.state.step % self.per_pass, rank=self.rank,
            world=self.world,
        )  # fmt: skip

    def _step(self, global_rows: int, batches: list[Any]) -> None:
        self.first_step_at = self.first_step_at or time.time()
        started = time.perf_counter()
        self.engine.begin_step(self.state.step)
        torch.manual_seed(dropout_seed(self.settings.seed, self.state.step, self.rank))
        objective = self.job.objective
        if self.job.courses:
            objective = replace(objective, **self._numbers(self.state.step))
        due = self.state.step + 1
        looks_at_gradients = due % self.settings.log_every == 0 or due % self.per_epoch == 0
        for batch in batches:
            loss, parts = self.lesson.loss(self.engine, batch, objective, self.meter if looks_at_gradients else None)
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
            f"{self.lesson.unit}_per_second": self.meter.speed(sums, seconds),
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
        values = self.lesson.validation(self.engine)
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

    def publish(self) -> None:
        """Writes the checkpoint that was asked for, the best or the last one, as a Hugging Face folder."""
        step, value = self.state.best_step, self.state.best_value
        if self.settings.choose == "last":
            step, value = self.state.step, self.state.last_value
        chosen = self.checkpoints.load(step)
        staged = self.store.staging(self.job.product)
        staged.mkdir(parents=True)
        with naming(staged):
            model = self.lesson.publish(chosen.weights(), staged, place=self.store.where(self.job.product))
        facts = {
            "metric": self.job.metric,
            "value": value,
            "step": step,
            "steps": self.state.step,
            "seconds": round(self.state.seconds, 1),
            "parameters": count_parameters(model),
            "precision": self.job.precision,
            **({"excluded": dict(self.job.excluded)} if self.job.excluded else {}),
            **({"stages_before": dict(self.job.stages_before)} if self.job.stages_before else {}),
        }
        commit_folder(self.store, staged, self.job.product, self.job.fingerprint, facts)

    def close(self) -> None:
        if self.curves:
            self.curves.close()
        self.engine.close()
        self.lesson.close()


def lesson_of(job: TrainingJob, device: torch.device) -> Lesson:
    """What this training learns, by its task."""
    if job.config.task == "causal_lm":
        return LanguageLesson(job, device)
    return ClassLesson(job, device)
