"""One trial of a search: a student's training on the share of the rows, an epoch at a time. It knows no Ray.

A trial is a training with a folder of its own, so that it goes on from its last checkpoint after any stop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raydistill.config.points import with_point
from raydistill.config.run import Config
from raydistill.config.training import DeepSpeed
from raydistill.data.folds import FoldRows
from raydistill.errors import UserError, first_line, storage_problem
from raydistill.models.source import ModelSource
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.record.store import Store, open_store
from raydistill.search.space import point_id
from raydistill.stages.checkpoints import Checkpoints, State
from raydistill.stages.cluster import Resources
from raydistill.stages.curves import read_curves
from raydistill.stages.job import TrainingJob
from raydistill.stages.loop import TrainingRank
from raydistill.stages.ranks import from_rank_zero, rank_and_world
from raydistill.stages.search_rows import rows_plan
from raydistill.stages.training_job import TrainingRequest, training_job, training_plan

FOLDER = "tune/trials"
ROUNDED = 6  # digits of metrics
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
    own: dict[str, Any] = {"workers": workers, "validate_every": None, "patience": None, "checkpoint_every": None}
    if workers == 1:
        micro_batches = config.train.accumulation * (1 if fused else config.train.workers)
        own |= {"accumulation": micro_batches, "deepspeed": DeepSpeed()}
    return config.model_copy(update={"train": config.train.model_copy(update=own)})


@dataclass(frozen=True)
class Work:
    """What one process trains: a trial, or those of a fused group that are left, in `kept`."""

    jobs: Mapping[int, TrainingJob]  # by the trials' numbers; of all members of a group, those that are not left too
    kept: tuple[int, ...]
    group: str = ""  # the folder of a group's checkpoints, which are the fingerprint's
    fingerprint: str = ""

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

    def job(self, number: int, point: Point, *, fused: bool = False) -> TrainingJob:
        """The trial as what a process is sent."""
        job = training_job(self._request(point, fused=fused), self.plan(point))
        folder, epoch_rows = trial_folder(trial_name(number, point)), job.epoch_rows
        if self.rows is not None:
            share = self.rows.open()
            epoch_rows = sum(share.count(entry.file) for entry in share.manifest.files)
        own = {"title": f"trial {number}", "folder": folder, "product": f"{folder}/model"}
        return replace(job, **own, rows=self.rows, epoch_rows=epoch_rows)

    def work(self, number: int, point: Point) -> Work:
        """The trial alone as what a process trains."""
        return Work({number: self.job(number, point)}, (number,))


class TrialTraining:
    """A trial under way, in a process of its own or on one rank of several. `step` trains an epoch."""

    def __init__(self, work: Work, stopped: Callable[[], bool] = lambda: False) -> None:
        ((self._number, self._job),) = work.jobs.items()
        self._stopped = stopped
        self._rank: TrainingRank | None = None
        self._curve: list[dict[str, float]] = []
        self._is_new = True

    def step(self) -> list[Outcome]:
        """The trial after one more epoch, or first of all where it stands, if it goes on after a stop."""
        try:
            return [self.advance()]
        except Exception as error:  # whatever it is, it is this trial's: a row of the table, with its reason
            return [self.given_up(error)]

    def keep(self, numbers: Sequence[int]) -> None:
        """Those that go on: this one, as long as the process has it."""

    def advance(self) -> Outcome:
        """What `step` does; raises what keeps the trial from it."""
        if self._rank is None:
            self._rank = TrainingRank(self._job, lambda update: None, self._stopped)
            self._validations = self._rank.validations()
            self._curve = committed_curve(open_store(self._job.run_url), self._job.folder, self._rank.state.step)
        if not (self._is_new and self._curve):
            values = next(self._validations, None)
            if values is not None:
                self._curve.append(rounded(values))
        self._is_new = False
        return self._outcome()

    def given_up(self, error: Exception) -> Outcome:
        """The trial that an error ended, or all of them."""
        if isinstance(error, OSError) and (problem := storage_problem(error)) is not None:
            return self._outcome(problem=str(problem))
        return self._outcome(failed=reason_of(error, self._job.title))

    def _outcome(self, **told: str) -> Outcome:
        state, began = (self._rank.state, self._rank.first_step_at) if self._rank is not None else (State(), None)
        return Outcome(self._number, tuple(self._curve), state.step, state.seconds, began, **told)

    def close(self) -> None:
        """Lets go. All that counts was saved with the last checkpoint, and another process may have gone on from it."""
        if self._rank is not None:
            if self._rank.curves:
                self._rank.curves.leave()
                self._rank.curves = None
            self._rank.close()
            self._rank = None


def follow(
    work: Work, *, report: Callable[[Outcome], None], goes_on: Callable[[int], bool], stopped: Callable[[], bool]
) -> None:
    """One rank of a trial of several workers: trains it epoch by epoch, for as long as it is to go on.

    Collective. Rank 0 reports every epoch and is told whether the trial goes on to another number of them; `stopped`
    ends it within one. What the user must mend is reported by the rank that meets it, since others may wait for it in
    a collective, and raised; all else is raised alone, as a worker that is lost.
    """
    training, rank = TrialTraining(work, stopped), rank_and_world()[0]
    try:
        wanted = True
        while wanted:
            outcome = training.advance()
            if rank == 0:
                report(outcome)
                wanted = goes_on(len(outcome.curve) + 1)
            wanted = from_rank_zero(wanted)
    except Exception as error:
        outcome = training.given_up(error)
        if outcome.problem or isinstance(error, UserError):
            report(outcome)
        raise
    finally:
        training.close()


def reason_of(error: Exception, title: str = "") -> str:
    """Why a training failed, in one line that does not name it."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return kind + first_line(error).removeprefix(f"{title} training: ")


def committed_curve(store: Store, folder: str, step: int) -> list[dict[str, float]]:
    """The metrics of each epoch of a trial up to a step."""
    points = (p for p in read_curves(store, folder) if p["group"] == "validation" and p["step"] <= step)
    return [rounded({k: v for k, v in point.items() if k not in ("step", "epoch", "group")}) for point in points]


def standing_curve(store: Store, folder: str, fingerprint: str) -> tuple[list[dict[str, float]], State]:
    """What a trial reached before a stop, as far as its newest checkpoint that verifies, and how it stood there."""
    checkpoints = Checkpoints(store, folder, fingerprint)
    step = checkpoints.newest()
    return ([], State()) if step is None else (committed_curve(store, folder, step), checkpoints.load(step).state)


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """As the records hold them: so many digits that equal trainings compare as equal."""
    return {name: float(f"{value:.{ROUNDED}g}") for name, value in values.items()}
