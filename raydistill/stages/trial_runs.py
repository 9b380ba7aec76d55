"""Trials on Ray Tune: a process for each, or for each fused group, which stays for the next. Tune places them, `Search`
decides. The process of a trial of several workers is their driver (`trial_workers.py`).

Tune's own state is not used to go on after a stop: everything that counts stands committed in the trials' folders.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from typing import Any, ClassVar

from raydistill.errors import Interrupted, UserError
from raydistill.stages.cluster import (
    TRIAL_DRIVER,
    Resources,
    Share,
    beside_driver,
    ray_storage,
    remove_orphans,
    share_for_trials,
    worker_environment,
)
from raydistill.stages.group_training import training_of
from raydistill.stages.progress import GRACE_SECONDS, Progress
from raydistill.stages.search import Search
from raydistill.stages.trial import Trials, Work
from raydistill.stages.trial_workers import SCRATCH, WorkersTraining

POLL_SECONDS = 0.2
MANY = 1_000_000  # runs that Tune may start; the search says when it is over


def run_trials(search: Search, trials: Trials, resources: Resources, progress: Progress) -> None:
    """Trains trials until the search is over or its time is. Raises UserError and Interrupted."""
    share = share_for_trials(trials.config, resources)
    store = trials.run.store
    scratch = f"{SCRATCH}/{uuid.uuid4().hex[:8]}"
    result: dict[str, Any] = {}

    def fit() -> None:
        try:
            _tuner(search, trials, share, scratch, progress).fit()
        except BaseException as error:
            result["error"] = error

    thread = threading.Thread(target=fit, daemon=True, name="tune")
    thread.start()
    progress.say(f"tune: starting up to {_in_words(share)}")
    asked = None
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        if share.workers > 1:
            remove_orphans()
        asked = asked or (time.monotonic() if progress.stopping else None)
        if asked is not None and time.monotonic() - asked > GRACE_SECONDS:
            raise Interrupted(progress.signal)
    Live.held.clear()
    if store.exists(SCRATCH):
        store.remove(SCRATCH)
    if "error" in result:
        raise result["error"]
    if search.problem:
        raise UserError(search.problem)
    progress.check()


def _in_words(share: Share) -> str:
    if share.workers == 1:
        return f"{share.processes} processes, {share.cpus} CPU each"
    several = "s" if share.processes > 1 else ""
    return f"{share.processes} trial{several} of {share.workers} workers, {share.cpus} CPU each"


class Live:
    """What Tune's parts share with the driver. Tune pickles its settings as it goes: this as a name, not as a copy."""

    held: ClassVar[dict[str, Live]] = {}

    def __init__(self, search: Search, trials: Trials, progress: Progress, board: Any, at_once: int) -> None:
        self.search, self.trials, self.progress, self.board, self.at_once = search, trials, progress, board, at_once
        self.name = uuid.uuid4().hex
        self.held[self.name] = self

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return live_of, (self.name,)

    @property
    def has_ended(self) -> bool:
        """Whether no trial is to be trained on, for whatever reason."""
        return self.progress.stopping or bool(self.search.problem) or self.search.has_run_out_of_time


def live_of(name: str) -> Live:
    """The one of this process that has the name."""
    return Live.held[name]


class Board:
    """A Ray actor that hands work to the processes, and then says which of their trials go on."""

    def __init__(self) -> None:
        self._work: dict[str, Work] = {}
        self._kept: dict[str, list[int]] = {}

    def put(self, name: str, work: Work) -> None:
        self._work[name] = work

    def get(self, name: str) -> Work:
        return self._work[name]

    def keep(self, name: str, numbers: list[int]) -> None:
        self._kept[name] = numbers

    def kept(self, name: str) -> list[int] | None:
        """None before the first decision."""
        return self._kept.get(name)

    def forget(self, name: str) -> None:
        self._work.pop(name, None)
        self._kept.pop(name, None)


def _tuner(search: Search, trials: Trials, share: Share, scratch: str, progress: Progress) -> Any:
    """The Tuner that runs the search's trials."""
    from ray import tune

    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # curves and tables are our own
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # which prints a banner whatever `verbose` says
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    live = Live(search, trials, progress, beside_driver(Board), share.processes)
    wants: dict[str, float] = {name: count for name, count in (("CPU", share.cpus), ("GPU", share.gpus)) if count}
    if share.workers > 1:  # these are its workers', which a driver that held a CPU would keep waiting
        wants = {"CPU": 0, TRIAL_DRIVER: 1}

    class Stop(tune.Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return live.has_ended

    return tune.Tuner(
        tune.with_resources(_trainable(live.board, share, worker_environment(trials.resources)), wants),
        tune_config=tune.TuneConfig(
            search_alg=_searcher(live), scheduler=_scheduler(live),
            num_samples=MANY, reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune", verbose=0, stop=Stop(), callbacks=[_silence()], **ray_storage(trials.run.store, scratch)
        ),
    )  # fmt: skip


def _silence() -> Any:
    """In the place of what would print a line for each of Tune's runs that ends."""
    from ray.tune.progress_reporter import TrialProgressCallback

    class Silence(TrialProgressCallback):
        def _print(self, msg: str) -> None:
            pass

    return Silence()


def _trainable(board: Any, share: Share, environment: dict[str, str]) -> Any:
    from ray import tune

    class TrialActor(tune.Trainable):
        """Trains a trial or a group an epoch at a time; reset for the next work instead of being started anew."""

        def setup(self, config: dict[str, Any]) -> None:
            import torch

            torch.set_num_threads(share.cpus)
            self._begin(config)

        def _begin(self, config: dict[str, Any]) -> None:
            import ray

            self._name = config["work"]
            work: Any = ray.get(board.get.remote(self._name))
            self._is_group = bool(work.group)
            several = work.workers > 1
            self._training = WorkersTraining(work, share, environment) if several else training_of(work)

        def step(self) -> dict[str, Any]:
            import ray

            if self._is_group and (kept := ray.get(board.kept.remote(self._name))) is not None:
                self._training.keep(kept)
            outcomes = self._training.step()
            return {"outcomes": outcomes, "epoch": max(len(outcome.curve) for outcome in outcomes)}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self._training.close()
            self._begin(new_config)
            return True

        def cleanup(self) -> None:
            self._training.close()

        def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
            return {}  # what a trial goes on from stands in its folder

        def load_checkpoint(self, checkpoint: Any) -> None:
            pass

    return TrialActor


def _searcher(live: Live) -> Any:
    import ray
    from ray.tune.search import Searcher

    class Points(Searcher):
        """Gives Tune the work that is to be done now. Trials that had to wait come as a new run of Tune's."""

        def __init__(self) -> None:
            super().__init__(metric="epoch", mode="max")
            self._numbers: dict[str, tuple[int, ...]] = {}

        def suggest(self, trial_id: str) -> Any:
            search = live.search
            work = search.next() if search.processes < live.at_once and not live.has_ended else None
            if work is None:
                return Searcher.FINISHED if search.is_over or live.has_ended else None
            search.start(work.kept)
            self._numbers[trial_id] = work.kept
            ray.get(live.board.put.remote(trial_id, work))
            return {"work": trial_id}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            numbers = self._numbers.pop(trial_id)
            live.board.forget.remote(trial_id)
            if error:
                live.search.lost(numbers, "its process ended, each time it was started")
            else:
                live.search.leave(numbers)

        def save(self, checkpoint_path: str) -> None:
            pass

        def restore(self, checkpoint_path: str) -> None:
            pass

    return Points()


def _scheduler(live: Live) -> Any:
    import ray
    from ray.tune.schedulers import FIFOScheduler

    class Rungs(FIFOScheduler):
        """Passes results on; trials that are to wait leave their process, and come back from their checkpoint."""

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            kept = live.search.update(result["outcomes"])
            if not kept:
                return self.STOP
            ray.get(live.board.keep.remote(trial.config["work"], kept))
            return self.CONTINUE

    return Rungs()
