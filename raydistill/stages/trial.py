"""The trials of a search: what each is made of, what a process is sent of it, and what it says. It knows no Ray.

A trial is a training with a folder of its own, so that it goes on from its last checkpoint after any stop. One with
stages (`train.stages`) has a folder for each, and its epochs are theirs in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from raydistill.config.points import with_point
from raydistill.config.run import Config
from raydistill.config.training import DeepSpeed
from raydistill.data.folds import FoldRows
from raydistill.models.source import ModelSource
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.search.space import point_id
from raydistill.search.trials import Trial
from raydistill.stages.cluster import Resources
from raydistill.stages.job import TrainingJob
from raydistill.stages.search_rows import rows_plan
from raydistill.stages.training_job import TrainingRequest, training_job, training_plan
from raydistill.stages.training_stages import training_stages
from raydistill.stages.trial_standing import Standing, standing

FOLDER = "tune/trials"
STAGES = "stages"  # in a trial's folder, those of its stages
Point = Mapping[str, Any]


def trial_name(number: int, point: Point) -> str:
    """What a trial is called: by its number and its point."""
    return f"{number:04d}-{point_id(point)}"


def trial_folder(name: str) -> str:
    """The folder of a trial's checkpoints, curves and record."""
    return f"{FOLDER}/{name}"


def trial_config(config: Config, point: Point, *, fused: bool = False) -> Config:
    """The run's settings with the point's, as a trial trains with them: to its end, by its own number of workers.

    One worker is a process without DeepSpeed. Neither that nor its micro-batches, which are as large as those of many,
    change the numbers. A member of a fused group takes the batches of a worker whole.
    """
    workers, config = config.trial_workers, with_point(config, point)
    whole_epochs: dict[str, Any] = {"validate_every": None, "patience": None}
    own = whole_epochs | {"workers": workers, "checkpoint_every": None}
    if workers == 1:
        micro_batches = config.train.accumulation * (1 if fused else config.train.workers)
        own |= {"accumulation": micro_batches, "deepspeed": DeepSpeed()}
    if config.train.stages is not None:
        own["stages"] = tuple(stage.model_copy(update=whole_epochs) for stage in config.train.stages)
    return config.model_copy(update={"train": config.train.model_copy(update=own)})


@dataclass(frozen=True)
class Work:
    """What one process trains: a trial, or those of a fused group that are left, in `kept`."""

    jobs: Mapping[int, TrainingJob]  # by the trials' numbers; of all members of a group, those that are not left too
    kept: tuple[int, ...]
    group: str = ""  # the folder of a group's checkpoints, which are the fingerprint's
    fingerprint: str = ""
    later: tuple[TrainingJob, ...] = ()  # of a trial alone: the stages that follow the first

    @property
    def workers(self) -> int:
        """That train it; one is the process itself."""
        return 1 if self.group else next(iter(self.jobs.values())).settings.workers


@dataclass(frozen=True)
class Outcome:
    """Where a trial stands after its process did some work on it."""

    number: int
    curve: tuple[dict[str, float], ...]
    steps: int
    seconds: float
    first_step_at: float | None = None  # when its process took the first step of this work, seconds since 1970
    failed: str = ""  # why it cannot go on
    problem: str = ""  # what the user must mend before any trial can
    apart: str = ""  # why it cannot be trained together with others


@dataclass(frozen=True)
class Trials:
    """What all trials of a search have in common, and how each one is made of it."""

    config: Config
    run: Run
    resources: Resources
    source: ModelSource
    rows: FoldRows | None

    def _request(self, point: Point, *, fused: bool = False) -> TrainingRequest:
        config = trial_config(self.config, point, fused=fused)
        return TrainingRequest("student", config, self.run, self.resources, self.source, "tune")

    def plan(self, point: Point) -> Plan:
        """Everything that determines what a trial reaches."""
        plan = training_plan(self._request(point))
        rows = rows_plan(self.config, self.run).fingerprint if self.rows else None
        return Plan("trial", {**plan.inputs, "rows": rows})

    def new(self, number: int, point: Point) -> Trial:
        """A trial that has not begun."""
        epochs = [training.epochs for training in trial_config(self.config, point).train.trainings]
        return Trial(number, point, sum(epochs), epochs_before=sum(epochs[:-1]))

    def job(self, number: int, point: Point, *, fused: bool = False) -> TrainingJob:
        """The trial, or its first stage, as what a process is sent."""
        return self._jobs(number, point, fused=fused)[0]

    def _jobs(self, number: int, point: Point, *, fused: bool = False) -> tuple[TrainingJob, ...]:
        """The trial's stages, each of which goes on from what the one before made; one, if it has none."""
        request, plan = self._request(point, fused=fused), self.plan(point)
        folder = trial_folder(trial_name(number, point))
        jobs: list[TrainingJob] = []
        for stage in training_stages("student", request.config):
            job = training_job(replace(request, config=stage.config, stage=stage if stage.name else None), plan)
            place = f"{folder}/{STAGES}/{stage.name}" if stage.name else folder
            title = f"trial {number}, stage {stage.name}" if stage.name else f"trial {number}"
            own: dict[str, Any] = {
                "title": title,
                "section": stage.section,
                "folder": place,
                "product": f"{place}/model",
            }
            if stage.goes_on:
                begins = ModelSource(f"the {jobs[-1].title}", jobs[-1].product, store_url=self.run.store.root)
                own["begins_with"] = begins
            jobs.append(replace(job, **own, rows=self.rows, epoch_rows=self._epoch_rows(job)))
        return tuple(jobs)

    def _epoch_rows(self, job: TrainingJob) -> int:
        if self.rows is None:
            return job.epoch_rows
        share = self.rows.open()
        return sum(share.count(entry.file) for entry in share.manifest.files)

    def work(self, number: int, point: Point) -> Work:
        """The trial alone as what a process trains."""
        first, *later = self._jobs(number, point)
        return Work({number: first}, (number,), later=tuple(later))

    def standing(self, number: int, point: Point) -> Standing:
        """What a trial reached before a stop."""
        return standing(self._jobs(number, point))
