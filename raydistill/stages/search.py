"""A search under way: which trial runs next, what becomes of it, and its record. It knows no Ray.

Everything is a function of the settings and of what stands committed, so that a search that was killed goes on to the
same result: points are proposed again in the same order, ended trials come from their records, others from their
checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from raydistill.config.tune import Tune
from raydistill.errors import UserError
from raydistill.record.commit import Entry, commit_manifest, read_manifest
from raydistill.record.store import Store
from raydistill.search.points import next_points
from raydistill.search.rungs import decide
from raydistill.search.trials import Trial, trial_of
from raydistill.stages.trial import Trials, standing_curve, trial_folder

CURVES = "metrics.jsonl"


class Search:
    """The trials so far. Those in `live` are being trained now; `told` hears of every change of a trial."""

    def __init__(self, trials: Trials, told: Callable[[Trial], None] = lambda trial: None) -> None:
        tune = trials.config.tune
        assert tune is not None
        self.tune: Tune = tune
        self.trials: list[Trial] = []
        self.live: set[int] = set()
        self.problem = ""
        self._made_of, self._told = trials, told
        self._store: Store = trials.run.store
        self._attempts: dict[int, int] = {}
        self._ends = time.monotonic() + tune.time_budget if tune.time_budget else None

    @property
    def has_run_out_of_time(self) -> bool:
        return self._ends is not None and time.monotonic() >= self._ends

    @property
    def is_over(self) -> bool:
        """Whether every trial has ended."""
        return len(self.trials) >= self.tune.num_trials and all(trial.has_ended for trial in self.trials)

    def next(self) -> int | None:
        """The trial to train now, the earliest that may go on; None while all others wait, and when all have ended."""
        if self.problem or self.has_run_out_of_time:
            return None
        if self.tune.max_concurrent is not None and len(self.live) >= self.tune.max_concurrent:
            return None
        return next(iter(self.group()), None)

    def group(self) -> list[int]:
        """All trials that may be trained now, the earliest first: what an engine of several could take together."""
        self._settle()
        return [t.number for t in self.trials if self._stands_still(t) and self._what(t) == "go"]

    def update(self, number: int, result: Mapping[str, Any]) -> Literal["go", "leave"]:
        """Takes what a trial reached; whether it goes on at once, or is left, for good or until others have come up."""
        if result["problem"]:
            self.problem = result["problem"]
            return "leave"
        trial = self.trials[number]
        if trial.has_ended:
            return "leave"
        has_news = len(result["curve"]) > len(trial.curve)
        self.trials[number] = trial = replace(
            trial, curve=tuple(result["curve"]), steps=result["steps"], seconds=round(result["seconds"], 2)
        )
        if result["failed"]:
            self._end(trial, "failed", result["failed"])
            return "leave"
        if has_news:
            self._told(trial)
        return "go" if self._what(trial) == "go" and not self.has_run_out_of_time else "leave"

    def start(self, number: int) -> None:
        """Says that a trial is being trained."""
        self.live.add(number)

    def leave(self, number: int) -> None:
        """Says that a trial is no longer being trained."""
        self.live.discard(number)
        self._settle()

    def lost(self, number: int, reason: str) -> None:
        """Says that the process of a trial ended: it goes on from its checkpoint, a few times."""
        self._attempts[number] = self._attempts.get(number, 0) + 1
        if self._attempts[number] > self._made_of.config.train.max_failures and not self.trials[number].has_ended:
            self._end(self.trials[number], "failed", reason)
        self.leave(number)

    def _stands_still(self, trial: Trial) -> bool:
        return not trial.has_ended and trial.number not in self.live

    def _what(self, trial: Trial) -> str:
        return decide(self.tune, self.trials, trial.number).what

    def _settle(self) -> None:
        """Proposes trials and ends those that are decided, until neither changes anything."""
        changes = True
        while changes:
            changes = self._propose()
            for trial in [t for t in self.trials if self._stands_still(t)]:
                decision = decide(self.tune, self.trials, trial.number)
                if decision.what in ("stop", "finished"):
                    self._end(trial, "stopped" if decision.what == "stop" else "finished", decision.reason)
                    changes = True

    def _propose(self) -> bool:
        """Takes up the next generation once no trial of this one is left to start."""
        if any(self._stands_still(t) and not t.curve for t in self.trials):
            return False
        points = next_points(self.tune, self.trials) or []
        for point in points:
            self.trials.append(self._taken_up(len(self.trials), point))
        return bool(points)

    def _taken_up(self, number: int, point: dict[str, Any]) -> Trial:
        """A trial from its record, or from where its training stands, or new."""
        folder = trial_folder(number, point)
        try:
            manifest = read_manifest(self._store, folder)
        except UserError:  # a damaged record: the trial is trained again
            manifest = None
        if manifest is not None:
            self._clear(folder)
            return trial_of(manifest.facts["trial"])
        config = self._made_of.config_of(point)
        curve, state = standing_curve(self._store, folder, self._made_of.plan(point).fingerprint)
        seconds = round(state.seconds, 2)
        return Trial(number, point, config.train.epochs, tuple(curve), steps=state.step, seconds=seconds)

    def _end(self, trial: Trial, status: Literal["finished", "stopped", "failed"], reason: str) -> None:
        """Commits the record of a trial, then clears its checkpoints away: nothing goes on from them."""
        trial = replace(trial, status=status, reason=reason)
        self.trials[trial.number] = trial
        folder = trial_folder(trial.number, dict(trial.point))
        entries: list[Entry] = []
        if self._store.exists(f"{folder}/{CURVES}"):
            name = f"{folder}/{CURVES}"
            entries.append(Entry(CURVES, self._store.sha256(name), self._store.size(name)))
        fingerprint = self._made_of.plan(dict(trial.point)).fingerprint
        commit_manifest(self._store, folder, fingerprint, entries, {"trial": trial.record()})
        self._clear(folder)
        self._told(trial)

    def _clear(self, folder: str) -> None:
        for name in ("checkpoints", "start"):
            if self._store.exists(f"{folder}/{name}"):
                self._store.remove(f"{folder}/{name}")
