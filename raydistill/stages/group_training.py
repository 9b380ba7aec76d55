"""A fused group of trials under way, an epoch at a time, as `trial_training.py` has a trial alone. It knows no Ray."""

from __future__ import annotations

from collections.abc import Sequence

from raydistill.errors import storage_problem
from raydistill.stages.fused import FusedGroup
from raydistill.stages.trial import Outcome, Work
from raydistill.stages.trial_standing import rounded
from raydistill.stages.trial_training import TrialTraining, reason_of


class GroupTraining:
    """The trials of a group that are left. `step` trains an epoch of them all."""

    def __init__(self, work: Work) -> None:
        self._work, self._kept = work, list(work.kept)
        self._names = {number: job.folder.rpartition("/")[2] for number, job in work.jobs.items()}
        self._group: FusedGroup | None = None

    def step(self) -> list[Outcome]:
        """Every trial after one more epoch, or first of all where it stands, if the group goes on after a stop."""
        try:
            self._train()
        except Exception as error:  # such as too little memory for so many: each may be trained alone
            if isinstance(error, OSError) and (problem := storage_problem(error)) is not None:
                return self._outcomes(problem=str(problem))
            return self._outcomes(apart=reason_of(error))
        return self._outcomes()

    def keep(self, numbers: Sequence[int]) -> None:
        """Ends the trainings of the others. Kept by the next checkpoint only: who goes on says it again."""
        self._kept = [number for number in self._kept if number in numbers]
        if self._group is not None:
            self._group.drop([name for number, name in self._names.items() if number not in self._kept])

    def _train(self) -> None:
        if self._group is None:
            jobs = {self._names[number]: job for number, job in self._work.jobs.items()}
            self._group = FusedGroup(jobs, folder=self._work.group, fingerprint=self._work.fingerprint)
            stands = self._group.step > 0
            self.keep(self._kept)
            if stands:
                return
        if not self._group.finished:
            self._group.epoch()

    def _outcomes(self, **told: str) -> list[Outcome]:
        return [self._outcome(number, told) for number in self._kept]

    def _outcome(self, number: int, told: dict[str, str]) -> Outcome:
        if self._group is None:
            return Outcome(number, (), 0, 0.0, None, **told)
        name = self._names[number]
        failed = self._group.failed.get(name, "").removeprefix(f"{self._work.jobs[number].title} training: ")
        if name not in self._group.members and not told:  # it had ended, and its record is lost
            told = {"apart": f"trial {number} ended before the others"}
        steps, seconds = self._group.taken(name)
        curve = tuple(rounded(values) for values in self._group.history[name])
        began = self._group.first_step_at
        return Outcome(number, curve, steps, seconds, began, **({"failed": failed} if failed else told))

    def close(self) -> None:
        """Lets go. All that counts was saved with the last checkpoint, and another process may have gone on from it."""
        if self._group is not None:
            self._group.close()
            self._group = None


def training_of(work: Work) -> TrialTraining | GroupTraining:
    """What a process does of its work."""
    return GroupTraining(work) if work.group else TrialTraining(work)
