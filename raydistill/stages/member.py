"""A member of a fused group: what its training writes down, as an ordinary training of its settings does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from raydistill.losses.objective import Objective
from raydistill.losses.stacked import Targets
from raydistill.losses.term_gradients import gradient_squares
from raydistill.record.store import Store
from raydistill.stages.curves import WatchedCurves
from raydistill.stages.job import TrainingJob, class_objective
from raydistill.stages.meter import Meter, broken_step
from raydistill.stages.steps import not_finite
from raydistill.stages.watch import Watch, watched_part


def objective_at(job: TrainingJob, step: int, total: int) -> Objective:
    """A member's objective at a step, with the numbers that its courses give."""
    objective = class_objective(job)
    return replace(objective, **numbers_at(job, step, total)) if job.courses else objective


def numbers_at(job: TrainingJob, step: int, total: int) -> dict[str, float]:
    return {name: course.at(step, total) for name, course in job.courses.items()}


class MemberReport:
    """A member's meter and curves."""

    def __init__(
        self, job: TrainingJob, store: Store, step: int, device: torch.device, post: Callable[[dict[str, Any]], None]
    ) -> None:
        self._job, self._post = job, post
        self._meter = Meter(job.objective.part_names, device)
        self._watched = watched_part(job.objective)
        settings = f"{job.section}.learning_rate {job.settings.learning_rate:g}, precision {job.precision}"
        watch = Watch(self._watched, settings, steady="temperature" not in job.courses) if self._watched else None
        self._curves = WatchedCurves(store, job.folder, step, watch, post)
        self._rate, self._norm = 0.0, torch.zeros(())

    def look(self, objective: Objective, logits_NK: torch.Tensor, targets: Targets, rows: int) -> None:
        """Measures how strongly each part pulls at this step."""
        teacher = targets.teacher if objective.needs_teacher else None
        self._meter.add_gradients(gradient_squares(objective, logits_NK, targets.labels, teacher), rows)

    def add(
        self, loss: torch.Tensor, parts: dict[str, torch.Tensor], rows: int, seconds: float, rate: float,
        norm: torch.Tensor,
    ) -> None:  # fmt: skip
        self._meter.add(loss, parts, rows)
        self._meter.end_step(seconds)
        self._rate, self._norm = rate, norm

    def point(self, step: int, per_epoch: int, total: int) -> str | None:
        """Adds a point of the steps since the last one, if there are any; what is wrong where one is not finite."""
        if not self._meter.steps:
            return None
        sums, seconds = self._meter.take()
        squares = self._meter.take_gradients()
        if (broken := broken_step(sums, step)) is not None:
            return not_finite(self._job, broken)
        values, notes = self._meter.point(sums, squares, step, self._watched)
        values |= {
            "learning_rate": self._rate,
            **numbers_at(self._job, step - 1, total),
            "grad_norm": float(self._norm),
            "rows_per_second": self._meter.speed(sums, seconds),
        }
        self._curves.add(step, step / per_epoch, values, notes=notes)
        self._post({"step": step, **values})
        return None

    def validation(self, step: int, per_epoch: int, values: dict[str, float]) -> None:
        self._curves.add(step, step / per_epoch, values, group="validation")
        self._post({"step": step, "validation": values})

    def save(self) -> None:
        self._curves.save()

    def close(self) -> None:
        self._curves.close()

    def leave(self) -> None:
        self._curves.leave()
