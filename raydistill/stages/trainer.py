"""Ray Train around the loop: plan a training, start its workers, pass on progress and signals."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from typing import Any

from raydistill.errors import Interrupted, UserError, storage_problem
from raydistill.record.commit import Manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.store import open_store
from raydistill.stages.cluster import (
    Resources,
    Share,
    check_precision,
    new_mailbox,
    share_for_training,
    worker_environment,
)
from raydistill.stages.job import TrainingJob
from raydistill.stages.loop import run_training
from raydistill.stages.progress import GRACE_SECONDS, Progress, duration
from raydistill.stages.training_job import TrainingRequest, training_job, training_plan
from raydistill.stages.workers import Workers

POLL_SECONDS = 0.2
STOP_POLL_SECONDS = 0.5


def train_model(request: TrainingRequest, progress: Progress) -> Manifest:
    """Trains a teacher, the student or its control, and writes it in Hugging Face form; the manifest of its folder.

    What stands complete for the same inputs is kept; a training that was stopped goes on from its last checkpoint.
    Raises UserError for what the user can mend, Interrupted after a signal, with the state saved.
    """
    plan, manifest = begin_training(request, progress)
    if manifest is None:
        fit(training_job(request, plan), request.resources, progress)
        manifest = request.run.require(request.name)
        progress.say(f"{request.name}: {result(manifest)}, {manifest.facts['parameters']:,} parameters")
    return manifest


def begin_training(request: TrainingRequest, progress: Progress) -> tuple[Plan, Manifest | None]:
    """Checks a training against the cluster and opens its part of the run: its plan, its manifest when it is complete.

    Raises UserError when it does not fit, or stands there for another plan.
    """
    share_for_training(request.resources, request.settings, request.section)
    plan = training_plan(request)
    if (manifest := request.run.begin(request.name, plan)) is not None:
        progress.say(f"{request.name}: complete, {result(manifest)}")
    else:
        check_precision(request.resources, plan.inputs["precision"], request.section)
    return plan, manifest


def fit(job: TrainingJob, resources: Resources, progress: Progress) -> None:
    """Runs a training on its share of the cluster to its end. Raises UserError and Interrupted."""
    _fit(job, share_for_training(resources, job.settings, job.section), resources, progress)


def result(manifest: Manifest) -> str:
    """What a training came to, in words."""
    facts = manifest.facts
    return (
        f"validation {facts['metric']} {facts['value']:.4f} at step {facts['step']:,}"
        f" of {facts['steps']:,}, {duration(facts['seconds'])} of steps"
    )


def _fit(job: TrainingJob, share: Share, resources: Resources, progress: Progress) -> None:
    """Runs the workers to their end and passes on what they post."""
    mailbox = new_mailbox()
    scratch = f"{job.folder}/.ray/{uuid.uuid4().hex[:8]}"
    workers = Workers(
        _worker, {"job": job, "mailbox": mailbox}, share, store=open_store(job.run_url), scratch=scratch,
        environment=worker_environment(resources), max_failures=job.settings.max_failures,
    )  # fmt: skip
    several = "s" if share.workers > 1 else ""
    progress.say(f"{job.title}: starting {share.workers} worker{several}, {share.cpus} CPU each, {job.precision}")
    _watch(job, workers, mailbox, progress)
    _clear(job, scratch)
    value = workers.result()
    if "problem" in value:
        raise UserError(value["problem"])
    if value["outcome"] == "stopped":
        stop = Interrupted(progress.signal)
        progress.say(f"{job.title}: stopped by {stop}, state saved at step {value['step']:,}")
        raise stop


def _watch(job: TrainingJob, workers: Workers, mailbox: Any, progress: Progress) -> None:
    """Shows what the workers post until they end; after a signal asks them to stop and waits a while for it.

    Raises UserError for a problem that one worker met while the others wait for it.
    """
    import ray
    from ray.exceptions import RayError

    reader = _Reader(job, progress)
    asked = None
    while workers.at_work:
        workers.wait(POLL_SECONDS)
        with contextlib.suppress(RayError):
            for update in ray.get(mailbox.take.remote()):
                if "problem" in update:
                    workers.wait(GRACE_SECONDS)
                    raise UserError(update["problem"])
                reader.show(update)
        if progress.stopping and asked is None:
            asked = time.monotonic()
            mailbox.stop.remote()
        if asked is not None and time.monotonic() - asked > GRACE_SECONDS:
            progress.say(f"{job.title}: the workers did not stop in time; the last checkpoint counts")
            raise Interrupted(progress.signal)


class _Reader:
    """Turns the workers' posts into lines."""

    def __init__(self, job: TrainingJob, progress: Progress) -> None:
        self._job, self._progress = job, progress
        self._total, self._per_epoch, self._first = 0, 1, 0
        self._started = time.monotonic()

    def show(self, update: dict[str, Any]) -> None:
        title, progress = self._job.title, self._progress
        if "going_on_from" in update:
            self._first = update["going_on_from"]
            progress.say(f"{title}: going on from step {self._first:,}")
        elif "warning" in update:
            progress.say(f"{title}: warning: {update['warning']}")
        elif "steps" in update:
            self._total, self._per_epoch, self._started = update["steps"], update["per_epoch"], time.monotonic()
        elif "validation" in update:
            values = ", ".join(f"{name} {value:.4f}" for name, value in update["validation"].items())
            epoch = update["step"] / self._per_epoch
            mark = " (best so far)" if update["best"] else ""
            progress.say(f"{title}: epoch {epoch:.3g}, step {update['step']:,}: {values}{mark}")
        else:
            unit = next(name for name in ("rows", "tokens") if f"{name}_per_second" in update)
            facts = f"loss {update['loss']:.4f}, {update[f'{unit}_per_second']:,.0f} {unit}/s"
            done, total = update["step"] - self._first, self._total - self._first
            progress.counts(title, done, total, "steps", self._started, facts)


def _clear(job: TrainingJob, scratch: str) -> None:
    """Ray's notes of a fit that ended are of no use to the next one."""
    store = open_store(job.run_url)
    folder = scratch.rpartition("/")[0]
    if store.exists(folder):
        store.remove(folder)


def _worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What every Ray Train worker runs. What the user must mend is returned: an exception would be retried."""
    import torch

    torch.set_num_threads(settings["threads"])
    job, mailbox = settings["job"], settings["mailbox"]
    try:
        if torch.distributed.get_rank() == 0:
            return run_training(job, post=mailbox.post.remote, stopped=stop_request(mailbox).is_set)
        return run_training(job, post=lambda update: None, stopped=lambda: False)
    except UserError as error:
        return _given_up(error, mailbox)
    except OSError as error:
        if (problem := storage_problem(error)) is None:
            raise
        return _given_up(problem, mailbox)


def _given_up(problem: UserError, mailbox: Any) -> dict[str, Any]:
    """Tells the driver before this worker ends: others may wait for it in a collective and never return."""
    import ray

    ray.get(mailbox.post.remote({"problem": str(problem)}))
    return {"problem": str(problem)}


def stop_request(mailbox: Any) -> threading.Event:
    """An event that is set once the driver asks for a stop; a thread looks for it, so that no step waits."""
    import ray
    from ray.exceptions import RayError

    asked = threading.Event()

    def look() -> None:
        while not asked.wait(STOP_POLL_SECONDS):
            with contextlib.suppress(RayError):
                if ray.get(mailbox.stopped.remote()):
                    asked.set()

    threading.Thread(target=look, daemon=True, name="stop-request").start()
    return asked
