"""A search under way: which trials run next, what becomes of them, and their records. It knows no Ray.

Everything is a function of the settings and of what stands committed, so that a search that was killed goes on to the
same result: points are proposed again in the same order, ended trials come from their records, others from their
checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from raydistill.config.tune import Tune
from raydistill.errors import UserError
from raydistill.record.commit import Entry, commit_manifest, read_manifest
from raydistill.record.store import Store
from raydistill.search.points import next_points
from raydistill.search.rungs import Decision, decide
from raydistill.search.trials import Trial, trial_of
from raydistill.stages.search_groups import Groups
from raydistill.stages.trial import STAGES, Outcome, Trials, Work, trial_folder, trial_name
from raydistill.stages.trial_standing import rounded

CURVES = "metrics.jsonl"


class Search:
    """The trials so far. `told` hears of every change of a trial, `say` of what a person should know besides.

    Trials are trained in processes, each of which has one trial, or those that are left of a fused group.
    """

    def __init__(
        self,
        trials: Trials,
        told: Callable[[Trial], None] = lambda trial: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        tune = trials.config.tune
        assert tune is not None
        self.tune: Tune = tune
        self.trials: list[Trial] = []
        self.groups = Groups(trials)
        self.processes = 0
        self.problem = ""
        self._made_of, self._told, self._say = trials, told, say
        self._store: Store = trials.run.store
        self.live: set[int] = set()  # trials that are being trained now
        self._attempts: dict[int, int] = {}
        self._given: dict[int, float] = {}  # when a new trial was given to a process, seconds since 1970
        self._ends = time.monotonic() + tune.time_budget if tune.time_budget else None

    @property
    def has_run_out_of_time(self) -> bool:
        return self._ends is not None and time.monotonic() >= self._ends

    @property
    def is_over(self) -> bool:
        """Whether every trial has ended."""
        return len(self.trials) >= self.tune.num_trials and all(trial.has_ended for trial in self.trials)

    def next(self) -> Work | None:
        """What a process is to train now, the earliest that may go on; None while all others wait, and at the end."""
        if self.problem or self.has_run_out_of_time:
            return None
        if self.tune.max_concurrent is not None and self.processes >= self.tune.max_concurrent:
            return None
        self._settle()
        for trial in filter(self._stands_still, self.trials):
            together = self._together(trial)
            if all(self._decision(number).what == "go" for number in together):
                group = self.groups.of(trial.number)
                if group is None:
                    return self._made_of.work(trial.number, trial.point)
                return self.groups.work(group, self.trials, together)
        return None

    def _together(self, trial: Trial) -> list[int]:
        """The trials that are trained with this one: those that are left of its group."""
        group = self.groups.of(trial.number)
        members = (trial.number,) if group is None else group.members
        return [number for number in members if not self.trials[number].has_ended]

    def start(self, numbers: Sequence[int]) -> None:
        """Says that a process trains these."""
        self.processes += 1
        self.live |= set(numbers)
        self._given |= {number: time.time() for number in numbers if not self.trials[number].curve}

    def update(self, outcomes: Sequence[Outcome]) -> list[int]:
        """Takes what the trials of a process reached; which of them go on there at once.

        None of them does where one must wait until others have come up. What is decided for good is ended.
        """
        known = [outcome for outcome in outcomes if not self.trials[outcome.number].has_ended]
        if problem := next((outcome.problem for outcome in known if outcome.problem), ""):
            self.problem = problem
            return []
        if apart := next((outcome for outcome in known if outcome.apart), None):
            self._split(apart.number, apart.apart)
            return []
        for outcome in known:
            self._take(outcome)
        left: list[int] = []
        waits = self.has_run_out_of_time
        for number in [outcome.number for outcome in known if not outcome.failed]:
            decision = self._decision(number)
            if decision.what in ("stop", "finished"):
                self._end(self.trials[number], "stopped" if decision.what == "stop" else "finished", decision.reason)
            else:
                left.append(number)
                waits = waits or decision.what == "wait"
        return [] if waits else left

    def _take(self, outcome: Outcome) -> None:
        trial = self.trials[outcome.number]
        has_news = len(outcome.curve) > len(trial.curve)
        trial = replace(trial, curve=outcome.curve, steps=outcome.steps, seconds=round(outcome.seconds, 2))
        if outcome.first_step_at and (given := self._given.pop(outcome.number, None)):
            trial = replace(trial, facts={**trial.facts, "start_seconds": round(outcome.first_step_at - given, 2)})
        self.trials[outcome.number] = trial
        if outcome.failed:
            self._end(trial, "failed", outcome.failed)
        elif has_news:
            self._told(trial)

    def leave(self, numbers: Sequence[int]) -> None:
        """Says that a process no longer trains these."""
        self.processes -= 1
        self.live -= set(numbers)
        self._settle()

    def lost(self, numbers: Sequence[int], reason: str) -> None:
        """Says that a process ended by itself: its trials go on from their checkpoint, a few times."""
        first = numbers[0]
        self._attempts[first] = self._attempts.get(first, 0) + 1
        if self._attempts[first] > self._made_of.config.train.max_failures:
            if self.groups.of(first) is not None:
                self._split(first, reason)
            elif not self.trials[first].has_ended:
                self._end(self.trials[first], "failed", reason)
        self.leave(numbers)

    def _split(self, number: int, reason: str) -> None:
        """Gives up training a group together: those that have not ended begin anew, alone."""
        group = self.groups.of(number)
        assert group is not None
        self.groups.split(group, reason)
        for member in group.members:
            self._attempts.pop(member, None)
            if not self.trials[member].has_ended:
                self.trials[member] = replace(self.trials[member], curve=(), steps=0, seconds=0.0)
        self._say(
            f"trials {', '.join(map(str, group.members))} cannot be trained together and are trained alone: {reason}"
        )

    def _stands_still(self, trial: Trial) -> bool:
        return not trial.has_ended and trial.number not in self.live

    def _decision(self, number: int) -> Decision:
        return decide(self.tune, self.trials, number)

    def _settle(self) -> None:
        """Proposes trials and ends those that are decided, until neither changes anything."""
        changes = True
        while changes:
            changes = self._propose()
            for trial in [t for t in self.trials if self._stands_still(t)]:
                decision = self._decision(trial.number)
                if decision.what in ("stop", "finished"):
                    self._end(trial, "stopped" if decision.what == "stop" else "finished", decision.reason)
                    changes = True

    def _propose(self) -> bool:
        """Takes up the next generation once no trial of this one is left to start."""
        if any(self._stands_still(t) and not t.curve for t in self.trials):
            return False
        points = next_points(self.tune, self.trials) or []
        first = len(self.trials)
        batch = [self._made_of.new(number, point) for number, point in enumerate(points, first)]
        self.groups.form(batch)
        self.trials += batch
        for trial in batch:
            self.trials[trial.number] = self._taken_up(trial)
        for trial in self.trials[first:]:
            if trial.has_ended:
                self._clear(trial)
        return bool(points)

    def _taken_up(self, trial: Trial) -> Trial:
        """A trial from its record, or from where its training stands, or new."""
        folder = _folder(trial)
        try:
            manifest = read_manifest(self._store, folder)
        except UserError:  # a damaged record: the trial is trained again
            manifest = None
        if manifest is not None:
            return trial_of({**manifest.facts["trial"], "epochs_before": trial.epochs_before})
        if (group := self.groups.of(trial.number)) is not None:
            state, name = self.groups.standing(group, self.trials), trial_name(trial.number, trial.point)
            curve = tuple(rounded(values) for values in state.history.get(name, []))
            steps, seconds = state.steps_of.get(name, 0), state.seconds_of.get(name, 0.0)
            return replace(trial, curve=curve, steps=steps, seconds=round(seconds, 2))
        found = self._made_of.standing(trial.number, trial.point)
        return replace(trial, curve=found.curve, steps=found.steps, seconds=round(found.seconds, 2))

    def _end(self, trial: Trial, status: Literal["finished", "stopped", "failed"], reason: str) -> None:
        """Commits the record of a trial, then clears its checkpoints away: nothing goes on from them."""
        trial = replace(trial, status=status, reason=reason)
        self.trials[trial.number] = trial
        folder = _folder(trial)
        names = (f"{place}/{CURVES}" for place in self._places(trial))
        entries = [
            Entry(name.removeprefix(f"{folder}/"), self._store.sha256(name), self._store.size(name))
            for name in names
            if self._store.exists(name)
        ]
        fingerprint = self._made_of.plan(trial.point).fingerprint
        commit_manifest(self._store, folder, fingerprint, entries, {"trial": trial.record()})
        self._clear(trial)
        self._told(trial)

    def _places(self, trial: Trial) -> list[str]:
        """The folders of a trial's training, or of its stages."""
        return [_folder(trial), *sorted(self._store.folders(f"{_folder(trial)}/{STAGES}"))]

    def _clear(self, trial: Trial) -> None:
        """Removes what an ended trial no longer needs, and its group's checkpoints with the last of its members."""
        for place in self._places(trial):
            for name in ("checkpoints", "start", "model"):
                if self._store.exists(f"{place}/{name}"):
                    self._store.remove(f"{place}/{name}")
        group = self.groups.of(trial.number)
        if group is not None and all(self.trials[number].has_ended for number in group.members):
            self.groups.clear(group)


def _folder(trial: Trial) -> str:
    return trial_folder(trial_name(trial.number, trial.point))
