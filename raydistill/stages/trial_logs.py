"""The trials of a search in the places that `tune.log_to` names: a run for each, alone or in a fused group alike.

The driver tells them, trial by trial, so that nothing that trains waits for them. What a search is does not depend on
them: one that cannot be reached is named and left, and the next start of the search sends what is missing there.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from raydistill.config.run import Config
from raydistill.errors import UserError, first_line
from raydistill.record.commit import read_manifest
from raydistill.record.run import Run
from raydistill.search.trials import Trial, trial_of
from raydistill.stages.trackers import FOLDER, TRACKERS, Tracker
from raydistill.stages.trial import FOLDER as TRIALS
from raydistill.stages.trial import trial_name


class TrialLogs:
    """Takes every change of a trial. `say` hears of a tracker that is lost, and at the end of where to look."""

    def __init__(self, config: Config, run: Run, say: Callable[[str], None]) -> None:
        assert config.tune is not None
        self._config, self._run, self._say = config, run, say
        self._trackers: dict[str, Tracker] = {}
        self._open: dict[tuple[str, int], tuple[Any, int]] = {}  # by tracker and trial: its run, and how far it is
        self._last: dict[int, Trial] = {}
        for name in config.tune.log_to:
            self._try(name, lambda name=name: self._trackers.update({name: TRACKERS[name](config, run)}))

    def told(self, trial: Trial) -> None:
        """Logs what is new of a trial."""
        self._last[trial.number] = trial
        for name in list(self._trackers):
            self._try(name, lambda name=name: self._tell(name, trial))

    def close(self) -> None:
        """Sends what ended trials miss, and closes the runs of those that have not. The last call."""
        if self._trackers:
            for trial in self._ended():
                self.told(trial)
        for name, number in list(self._open):
            if name in self._trackers:
                self._try(name, lambda name=name, number=number: self._end(name, self._last[number]))
        for name, tracker in self._trackers.items():
            self._say(f"tune: every trial in {name}: {tracker.where()}")
        self._trackers = {}  # after a signal Ray Tune's thread may still tell of a trial

    def _tell(self, name: str, trial: Trial) -> None:
        if self._run.store.exists(self._mark(name, trial)):
            return
        place = (name, trial.number)
        tracker = self._trackers[name]
        if place not in self._open:
            self._open[place] = tracker.begin(f"{self._search_id()}-{trial.number:04d}", trial)
        run, done = self._open[place]
        for epoch in range(done + 1, len(trial.curve) + 1):
            tracker.log(run, epoch, dict(trial.curve[epoch - 1]))
        self._open[place] = (run, max(done, len(trial.curve)))
        if trial.has_ended:
            self._end(name, trial)
            self._run.store.write(self._mark(name, trial), b"")

    def _end(self, name: str, trial: Trial) -> None:
        run, _ = self._open.pop((name, trial.number))
        self._trackers[name].end(run, trial)

    def _mark(self, name: str, trial: Trial) -> str:
        """A file that says that all of an ended trial was sent."""
        return f"{FOLDER}/sent/{name}-{trial_name(trial.number, trial.point)}"

    def _search_id(self) -> str:
        """What trials' keys begin with: one for as long as the search's folder stands."""
        name = f"{FOLDER}/id"
        if not self._run.store.exists(name):
            self._run.store.write(name, uuid.uuid4().hex[:12].encode())
        return self._run.store.read(name).decode()

    def _ended(self) -> list[Trial]:
        """The trials that have a record."""
        found: list[Trial] = []
        for folder in self._run.store.folders(TRIALS):
            try:
                manifest = read_manifest(self._run.store, folder)
            except UserError:  # a damaged record is not sent: the trial is trained again when it is needed
                continue
            if manifest is not None:
                found.append(trial_of(manifest.facts["trial"]))
        return found

    def _try(self, name: str, action: Callable[[], None]) -> None:
        """Whatever these packages raise ends the logging there, not the search."""
        try:
            action()
        except Exception as error:
            self._trackers.pop(name, None)
            self._say(
                f"tune: warning: tune.log_to: {name}: {first_line(error)}. The search goes on without it; the same"
                " command sends later what is missing there"
            )
