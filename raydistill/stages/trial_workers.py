"""A trial of several workers, driven from its process: Ray Train starts them, and they train as far as they are let.

The process takes no CPU, so that its workers find all that trials have; how many run at once is known to fit
(`cluster.share_for_trials`). A worker that is lost is replaced a few times, and the trial goes on from its checkpoint.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from raydistill.record.store import open_store
from raydistill.stages.cluster import Mailbox, Share, beside_driver
from raydistill.stages.ranks import rank_and_world
from raydistill.stages.trainer import stop_request
from raydistill.stages.trial import Outcome, Work
from raydistill.stages.trial_training import follow
from raydistill.stages.workers import Workers

POLL_SECONDS = 0.1
SCRATCH = "tune/.ray"


class Turns(Mailbox):
    """The mailbox of a trial's workers, which also says how many epochs they may train."""

    def __init__(self) -> None:
        super().__init__()
        self._allowed = 0

    def allow(self, epochs: int) -> None:
        self._allowed = epochs

    def goes_on(self, epochs: int) -> bool | None:
        """Whether the trial is trained to so many epochs; None before that is decided."""
        return False if self._stop else True if epochs <= self._allowed else None


class WorkersTraining:
    """A trial under way on workers of its own. `step` trains an epoch, as `TrialTraining` does in one process."""

    def __init__(self, work: Work, share: Share, environment: dict[str, str]) -> None:
        ((number, self._job),) = work.jobs.items()
        self._share = replace(share, processes=1, workers=work.workers)
        self._environment = environment
        os.environ.update(environment)  # Ray Train reads here how often its controller is to look at the workers
        self._turns = beside_driver(Turns)
        self._sent = {"work": work, "turns": self._turns}
        self._latest, self._is_new = Outcome(number, (), 0, 0.0), True
        self._lost_times = 0
        self._workers = self._start()

    def _start(self) -> Workers:
        return Workers(
            _worker, self._sent, self._share, store=open_store(self._job.run_url),
            scratch=f"{SCRATCH}/{uuid.uuid4().hex[:8]}", environment=self._environment,
        )  # fmt: skip

    def step(self) -> list[Outcome]:
        """The trial after one more epoch, or first of all where it stands, if it goes on after a stop."""
        import ray

        ray.get(self._turns.allow.remote(len(self._latest.curve) + 1))
        while True:
            had_ended = not self._workers.at_work
            for outcome in ray.get(self._turns.take.remote()):
                if self._is_news(outcome):
                    self._latest, self._is_new = outcome, False
                    return [outcome]
            if had_ended:
                self._lost_times += 1
                if self._lost_times > self._job.settings.max_failures:
                    reason = self._workers.problem or "its workers ended"
                    return [replace(self._latest, failed=f"{reason} ({self._lost_times} times)")]
                self._workers = self._start()
            self._workers.wait(POLL_SECONDS)

    def _is_news(self, outcome: Outcome) -> bool:
        """Not where workers that took the place of others say that they stand."""
        reaches_further = self._is_new or len(outcome.curve) > len(self._latest.curve)
        return reaches_further or bool(outcome.failed or outcome.problem)

    def keep(self, numbers: Sequence[int]) -> None:
        """Those that go on: this one, as long as the process has it."""

    def close(self) -> None:
        """Ends the workers, and returns when they hold nothing of the cluster any more."""
        import ray

        ray.get(self._turns.stop.remote())
        self._workers.wait()


def _worker(sent: dict[str, Any]) -> None:
    """What each of the workers runs."""
    import ray
    import torch

    torch.set_num_threads(sent["threads"])
    turns = sent["turns"]

    def goes_on(epochs: int) -> bool:
        answer: Any = None
        while answer is None:
            time.sleep(POLL_SECONDS)
            answer = ray.get(turns.goes_on.remote(epochs))
        return answer

    stopped = stop_request(turns).is_set if rank_and_world()[0] == 0 else lambda: False
    follow(sent["work"], report=lambda o: ray.get(turns.post.remote(o)), goes_on=goes_on, stopped=stopped)
