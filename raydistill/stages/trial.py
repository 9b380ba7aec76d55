"""One trial of a search: a student's training on the share of the rows, an epoch at a time. It knows no Ray.

A trial is a training with a folder of its own, so that it goes on from its last checkpoint after any stop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from raydistill.config.points import with_point
from raydistill.config.run import Config
from raydistill.data.folds import FoldRows
from raydistill.errors import UserError, first_line, storage_problem
from raydistill.models import ModelSource
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.record.store import Store, open_store
from raydistill.search.space import Point, point_id
from raydistill.stages.checkpoints import Checkpoints, State
from raydistill.stages.cluster import Resources
from raydistill.stages.curves import read_curves
from raydistill.stages.job import TrainingJob
from raydistill.stages.loop import TrainingRank
from raydistill.stages.search_rows import rows_plan
from raydistill.stages.training_job import TrainingRequest, training_job, training_plan

FOLDER = "tune/trials"
ROUNDED = 6  # digits of metrics


def trial_folder(number: int, point: Point) -> str:
    """The folder of a trial's checkpoints, curves and record."""
    return f"{FOLDER}/{number:04d}-{point_id(point)}"


@dataclass(frozen=True)
class Trials:
    """What all trials of a search have in common, and how each one is made of it."""

    config: Config
    run: Run
    resources: Resources
    source: ModelSource
    rows: FoldRows | None

    def config_of(self, point: Point) -> Config:
        """The run's settings with the point's, as a trial trains with them: in one process, to its end.

        Neither one worker nor its micro-batches, which are as large as those of many, change the numbers.
        """
        config = with_point(self.config, point)
        alone = {"workers": 1, "accumulation": config.train.accumulation * config.train.workers}
        often = {"validate_every": None, "patience": None, "checkpoint_every": None}
        return config.model_copy(update={"train": config.train.model_copy(update=alone | often)})

    def _request(self, point: Point) -> TrainingRequest:
        return TrainingRequest("student", self.config_of(point), self.run, self.resources, self.source, "tune")

    def plan(self, point: Point) -> Plan:
        """Everything that determines what a trial reaches."""
        plan = training_plan(self._request(point))
        rows = rows_plan(self.config, self.run).fingerprint if self.rows else None
        return Plan("trial", {**plan.inputs, "rows": rows})

    def job(self, number: int, point: Point) -> TrainingJob:
        """The trial as what a worker is sent."""
        job, folder = training_job(self._request(point), self.plan(point)), trial_folder(number, point)
        epoch_rows = job.epoch_rows
        if self.rows is not None:
            share = self.rows.open()
            epoch_rows = sum(share.count(entry.file) for entry in share.manifest.files)
        return replace(
            job,
            title=f"trial {number}",
            folder=folder,
            product=f"{folder}/model",
            rows=self.rows,
            epoch_rows=epoch_rows,
        )


class TrialTraining:
    """A trial under way. `step` trains an epoch; what it gives has the metrics of every epoch so far."""

    def __init__(self, job: TrainingJob) -> None:
        self._job, self._rank, self._failed = job, None, ""
        self._curve: list[dict[str, float]] = []
        self._is_new = True

    def step(self) -> dict[str, Any]:
        """The trial after one more epoch, or first of all where it stands, if it goes on after a stop.

        `failed` is why the trial cannot go on; `problem` is what the user must mend before any trial can.
        """
        try:
            return self._step()
        except OSError as error:
            if (problem := storage_problem(error)) is None:
                return self._outcome(failed=f"{type(error).__name__}: {first_line(error)}")
            return self._outcome(problem=str(problem))
        except Exception as error:  # whatever it is, it is this trial's: a row of the table, with its reason
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            reason = first_line(error).removeprefix(f"{self._job.title} training: ")
            return self._outcome(failed=f"{kind}{reason}")

    def _step(self) -> dict[str, Any]:
        if self._rank is None:
            self._rank = TrainingRank(self._job, lambda update: None, lambda: False)
            self._validations = self._rank.validations()
            self._curve = committed_curve(open_store(self._job.run_url), self._job.folder, self._rank.state.step)
        if not (self._is_new and self._curve):
            values = next(self._validations, None)
            if values is not None:
                self._curve.append(_rounded(values))
        self._is_new = False
        return self._outcome()

    def _outcome(self, *, failed: str = "", problem: str = "") -> dict[str, Any]:
        state = self._rank.state if self._rank is not None else None
        latest = self._curve[-1] if self._curve else {}
        done = bool(failed or problem) or len(self._curve) >= self._job.settings.epochs
        return {
            **latest, "curve": list(self._curve), "epoch": len(self._curve), "done": done, "failed": failed,
            "problem": problem, "steps": state.step if state else 0, "seconds": state.seconds if state else 0.0,
        }  # fmt: skip

    def close(self) -> None:
        """Lets go. All that counts was saved with the last checkpoint, and another process may have gone on from it."""
        if self._rank is not None:
            if self._rank.curves:
                self._rank.curves.leave()
                self._rank.curves = None
            self._rank.close()
            self._rank = None


def committed_curve(store: Store, folder: str, step: int) -> list[dict[str, float]]:
    """The metrics of each epoch of a trial up to a step."""
    points = (p for p in read_curves(store, folder) if p["group"] == "validation" and p["step"] <= step)
    return [_rounded({k: v for k, v in point.items() if k not in ("step", "epoch", "group")}) for point in points]


def standing_curve(store: Store, folder: str, fingerprint: str) -> tuple[list[dict[str, float]], State]:
    """What a trial reached before a stop, as far as its newest checkpoint that verifies, and how it stood there."""
    checkpoints = Checkpoints(store, folder, fingerprint)
    step = checkpoints.newest()
    return ([], State()) if step is None else (committed_curve(store, folder, step), checkpoints.load(step).state)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    """As the records hold them: so many digits that equal trainings compare as equal."""
    return {name: float(f"{value:.{ROUNDED}g}") for name, value in values.items()}
