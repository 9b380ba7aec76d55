"""A trial under way, an epoch at a time: in a process of its own, or on one of several ranks. It knows no Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from raydistill.errors import UserError, first_line, storage_problem
from raydistill.record.store import open_store
from raydistill.stages.checkpoints import State
from raydistill.stages.loop import TrainingRank
from raydistill.stages.ranks import barrier, from_rank_zero, rank_and_world
from raydistill.stages.trial import Outcome, Work
from raydistill.stages.trial_standing import Curve, Standing, committed_curve, finished_stages, rounded


class TrialTraining:
    """A trial under way. `step` trains an epoch."""

    def __init__(self, work: Work, stopped: Callable[[], bool] = lambda: False) -> None:
        ((self._number, first),) = work.jobs.items()
        self._jobs = (first, *work.later)
        self._stopped = stopped
        self._rank: TrainingRank | None = None
        self._before = Standing()
        self._curve: Curve = []  # of the stage under way
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
            self._before = finished_stages(self._jobs)
            self._begin_stage()
        if not (self._is_new and self._outcome().curve):
            values = next(self._validations, None)
            while values is None and self._ends_stage():
                values = next(self._validations, None)
            if values is not None:
                self._curve.append(rounded(values))
        self._is_new = False
        return self._outcome()

    def _begin_stage(self) -> None:
        """Takes up the first stage that has made no model, where it stands."""
        job = self._jobs[self._before.stages]
        self._rank = TrainingRank(job, lambda update: None, self._stopped)
        self._validations = self._rank.validations()
        self._curve = committed_curve(open_store(job.run_url), job.folder, self._rank.state.step)

    def _ends_stage(self) -> bool:
        """Makes the model of a stage that came to its end and begins the next one, if there is one. Collective."""
        rank = self._rank
        assert rank is not None
        if rank.has_stopped or self._before.stages + 1 == len(self._jobs):
            return False
        if rank.rank == 0:
            rank.publish()
        barrier()
        done = self._before.after(self._curve, rank.state)
        self._before, self._curve = replace(done, stages=done.stages + 1), []
        self._rank = None
        rank.close()
        self._begin_stage()
        return True

    def given_up(self, error: Exception) -> Outcome:
        """The trial that an error ended, or all of them."""
        if isinstance(error, OSError) and (problem := storage_problem(error)) is not None:
            return self._outcome(problem=str(problem))
        return self._outcome(failed=reason_of(error, self._jobs[self._before.stages].title))

    def _outcome(self, **told: str) -> Outcome:
        state, began = (self._rank.state, self._rank.first_step_at) if self._rank is not None else (State(), None)
        found = self._before.after(self._curve, state)
        return Outcome(self._number, found.curve, found.steps, found.seconds, began, **told)

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
