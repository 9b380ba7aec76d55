"""Ray Train around the loop: plan a training, start its workers, pass on progress and signals."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from dataclasses import replace
from typing import Any

from raydistill.config import (
    KINDS_OF_SETS,
    LOSS_PARAMETERS,
    WITHOUT_TEMPERATURE,
    Config,
    Loss,
    TeacherMetrics,
    Train,
    Training,
    identity,
)
from raydistill.data.folds import FoldRows
from raydistill.data.shards import LABELLED_SPLITS, STUDENT_SPLITS
from raydistill.errors import Interrupted, UserError, storage_problem
from raydistill.losses.courses import Course
from raydistill.losses.objective import Objective
from raydistill.models import ModelSource, find_model, model_identity
from raydistill.record.commit import Manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run, part_of
from raydistill.record.store import LocalStore, open_store
from raydistill.stages.calibration import calibration_plan, teacher_temperature
from raydistill.stages.cluster import (
    Resources,
    check_precision,
    gains_from_bf16,
    new_mailbox,
    share_for_training,
    worker_environment,
)
from raydistill.stages.features import feature_terms
from raydistill.stages.loop import TrainingJob, run_training
from raydistill.stages.progress import GRACE_SECONDS, Progress, duration
from raydistill.stages.teachers import feature_source, folds_plan
from raydistill.stages.training_stages import TrainingStage, stage_inputs
from raydistill.students.build import needs_rows

POLL_SECONDS = 0.2
STOP_POLL_SECONDS = 0.5


def settings_of(config: Config, role: str) -> tuple[Training, str]:
    """The settings of a training and the section that they stand in."""
    if role == "teacher":
        assert config.teacher.fine_tune is not None
        return config.teacher.fine_tune, "teacher.fine_tune"
    return config.train, "train"


def train_model(
    role: str,
    config: Config,
    run: Run,
    resources: Resources,
    progress: Progress,
    *,
    source: ModelSource,
    part: str = "",
    without_fold: int | None = None,
) -> Manifest:
    """Trains a teacher, the student or its control, and writes it in Hugging Face form; the manifest of its folder.

    `part` is the part of the run that it becomes, where that is not named as its role; a teacher may be trained without
    a fold of train. What stands complete for the same inputs is kept; a training that was stopped goes on from its last
    checkpoint. Raises UserError for what the user can mend, Interrupted after a signal, with the state saved.
    """
    part = part or role
    plan, manifest = begin_training(
        role, config, run, resources, progress, source=source, part=part, without_fold=without_fold
    )
    if manifest is None:
        fit(training_job(role, config, run, plan, source, part=part, without_fold=without_fold), resources, progress)
        manifest = run.require(part)
        progress.say(f"{part}: {result(manifest)}, {manifest.facts['parameters']:,} parameters")
    return manifest


def begin_training(
    role: str,
    config: Config,
    run: Run,
    resources: Resources,
    progress: Progress,
    *,
    source: ModelSource,
    part: str,
    without_fold: int | None = None,
) -> tuple[Plan, Manifest | None]:
    """Checks a training against the cluster and opens its part of the run: its plan, its manifest when it is complete.

    Raises UserError when it does not fit, or stands there for another plan.
    """
    settings, section = settings_of(config, role)
    share_for_training(resources, settings, section)
    plan = training_plan(role, config, run, resources, source, part=part, without_fold=without_fold)
    if (manifest := run.begin(part, plan)) is not None:
        progress.say(f"{part}: complete, {result(manifest)}")
    else:
        check_precision(resources, plan.inputs["precision"], section)
    return plan, manifest


def fit(job: TrainingJob, resources: Resources, progress: Progress) -> None:
    """Runs a training on its share of the cluster to its end. Raises UserError and Interrupted."""
    share = share_for_training(resources, job.settings, job.section)
    _fit(job, share.processes, {"CPU": share.cpus, "GPU": share.gpus}, resources, progress)


def result(manifest: Manifest) -> str:
    """What a training came to, in words."""
    facts = manifest.facts
    return (
        f"validation {facts['metric']} {facts['value']:.4f} at step {facts['step']:,}"
        f" of {facts['steps']:,}, {duration(facts['seconds'])} of steps"
    )


def training_plan(
    role: str,
    config: Config,
    run: Run,
    resources: Resources,
    source: ModelSource,
    *,
    part: str = "",
    without_fold: int | None = None,
) -> Plan:
    """Everything that determines a training's result."""
    settings, section = settings_of(config, role)
    inputs: dict[str, Any] = {"data": run.require("data").fingerprint, "data.max_length": config.data.max_length}
    if role == "teacher":
        inputs["teacher.model"] = model_identity(source.folder())
        if without_fold is not None:
            folds = folds_plan(config, run.require("data")).fingerprint
            inputs |= {"teacher.folds": folds, "without_fold": without_fold}
    else:
        inputs |= student_inputs(config, source)
    if role == "student":
        inputs["cache"] = run.require("cache").fingerprint
        if config.teacher.calibrate:
            inputs["teacher.calibrate"] = calibration_plan(run).fingerprint
        if config.teacher.features_of is not None:
            inputs["teacher.features_of"] = config.teacher.features_of
        if config.train.caches_features:
            inputs["features"] = run.require("features").fingerprint
    skip = ("precision", "loss") if role == "control" else ("precision",)
    if isinstance(settings, Train) and settings.stages is not None:
        inputs[f"{section}.stages"] = stage_inputs(role, config)
    else:
        inputs |= {f"{section}.{name}": value for name, value in identity(settings, skip=skip).items()}
        if role == "control":
            inputs[f"{section}.loss.label_smoothing"] = config.train.loss.label_smoothing
    inputs["precision"] = resolve_precision(settings, run.plan(part or role), resources)
    return Plan(role, inputs)


def student_inputs(config: Config, teacher: ModelSource) -> dict[str, Any]:
    """What determines a student's first weights and tokenizer."""
    inputs: dict[str, Any] = {
        f"student.{name}": value for name, value in identity(config.student).items() if value is not None
    }
    if config.student.init == "pretrained":
        assert config.student.model is not None
        inputs["student.model"] = model_identity(
            find_model("student.model", config.student.model, config.student.revision)
        )
    else:
        facts = model_identity(teacher.folder())
        names = ("tokenizer_sha256",) if config.student.init == "config" else tuple(facts)
        inputs["teacher"] = {name: facts[name] for name in names}
    return inputs


def start_fingerprint(role: str, config: Config, run: Run, source: ModelSource) -> str | None:
    """What determines a student's first weights where they need rows of train; None where they do not.

    The control has the student's, so that both begin with the same.
    """
    if role == "teacher" or not needs_rows(config.student):
        return None
    inputs = {"data": run.require("data").fingerprint, "data.max_length": config.data.max_length}
    return Plan("start", inputs | student_inputs(config, source) | {"train.seed": config.train.seed}).fingerprint


def resolve_precision(settings: Training, standing: Plan | None, resources: Resources) -> str:
    """The precision asked for; for auto, what the standing training has, else what the device gains from."""
    if settings.precision != "auto":
        return settings.precision
    if standing is not None:
        return str(standing.inputs["precision"])
    return "bf16" if gains_from_bf16(resources) else "fp32"


def training_job(
    role: str,
    config: Config,
    run: Run,
    plan: Plan,
    source: ModelSource,
    *,
    part: str = "",
    without_fold: int | None = None,
    stage: TrainingStage | None = None,
) -> TrainingJob:
    """The plan, or one stage of it, as what a worker is sent."""
    settings, section = settings_of(config, role)
    part, response = part or role, response_kind("forward_kl", config.task)
    objective, courses = Objective(kind=response), {}
    if isinstance(settings, Train):
        smoothing = settings.loss.label_smoothing
        objective = Objective(kind=response, label_smoothing=smoothing)
        if role == "student":
            objective = replace(
                student_objective(settings.loss, config.task), features=feature_terms(config, source.folder(), stage)
            )
            courses = loss_courses(settings.loss)
    # A control has no teacher, in its choice of checkpoint neither.
    metric = "nll" if role == "control" and settings.metric in TeacherMetrics else settings.metric
    data = run.require("data")
    counted = data.shards(*(LABELLED_SPLITS if role == "teacher" else STUDENT_SPLITS))
    rows = None if without_fold is None else FoldRows(run.home("folds").root, without_fold, inside=False)
    epoch_rows = (
        sum(e.rows for e in counted) if rows is None else sum(map(rows.open().count, (e.file for e in counted)))
    )
    return TrainingJob(
        role=role, title=part, section=section, config=config, settings=settings, objective=objective, metric=metric,
        precision=plan.inputs["precision"], labels=tuple(data.facts["labels"]), fingerprint=plan.fingerprint,
        run_url=run.store.root, data_url=run.home("data").root, uses_cache=role == "student",
        splits=STUDENT_SPLITS if role == "student" else LABELLED_SPLITS, epoch_rows=epoch_rows,
        source=source, start=start_fingerprint(role, config, run, source),
        teacher_temperature=teacher_temperature(config, run) if role == "student" else 1.0,
        beside=feature_source(config, run) if objective.features and config.teacher.features_of else None,
        folder=part_of(part).folder, product=part_of(part).product, courses=courses, rows=rows,
    )  # fmt: skip


def student_objective(loss: Loss, task: str = "classification") -> Objective:
    """The settings as what a student is trained with."""
    parameters = {name: value for name in LOSS_PARAMETERS if (value := getattr(loss, name)) is not None}
    return Objective(
        temperature=1.0 if loss.kind in WITHOUT_TEMPERATURE else loss.temperature, alpha=loss.alpha,
        kind=response_kind(loss.kind, task),
        parameters=parameters, standardise=loss.standardise, label_smoothing=loss.label_smoothing,
        hard_targets=loss.hard_targets, always_response=loss.alpha_end is not None,
    )  # fmt: skip


def response_kind(kind: str, task: str) -> str:
    """The name of a kind of loss in losses/registry.py: sets of labels have their own."""
    return KINDS_OF_SETS[kind] if task == "multi_label" else kind


def loss_courses(loss: Loss) -> dict[str, Course]:
    """The numbers of the objective that change from step to step."""
    ends = {"temperature": loss.temperature_end, "alpha": loss.alpha_end}
    shape = loss.course or "linear"
    return {name: Course(getattr(loss, name), end, shape) for name, end in ends.items() if end is not None}


def _fit(job: TrainingJob, workers: int, each: dict[str, int], resources: Resources, progress: Progress) -> None:
    """Runs the workers to their end and passes on what they post."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    mailbox = new_mailbox()
    scratch = f"{job.folder}/.ray/{uuid.uuid4().hex[:8]}"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job, "mailbox": mailbox, "threads": each["CPU"]},
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=each["GPU"] > 0, resources_per_worker={k: v for k, v in each.items() if v}
        ),
        run_config=RunConfig(
            name="train",
            **_ray_storage(job, scratch),
            failure_config=FailureConfig(max_failures=job.settings.max_failures, controller_failure_limit=1),
            worker_runtime_env={"env_vars": worker_environment(resources)},
        ),
    )
    result: dict[str, Any] = {}

    def fit() -> None:
        try:
            result["value"] = trainer.fit().return_value
        except BaseException as error:
            result["error"] = error

    thread = threading.Thread(target=fit, daemon=True, name="fit")
    thread.start()
    progress.say(
        f"{job.title}: starting {workers} worker{'s' if workers > 1 else ''}, {each['CPU']} CPU each, {job.precision}"
    )
    _watch(job, thread, mailbox, progress)
    _clear(job, scratch)
    if "error" in result:
        raise result["error"]
    value = result["value"]
    if "problem" in value:
        raise UserError(value["problem"])
    if value["outcome"] == "stopped":
        stop = Interrupted(progress.signal)
        progress.say(f"{job.title}: stopped by {stop}, state saved at step {value['step']:,}")
        raise stop


def _watch(job: TrainingJob, thread: threading.Thread, mailbox: Any, progress: Progress) -> None:
    """Shows what the workers post until they end; after a signal asks them to stop and waits a while for it.

    Raises UserError for a problem that one worker met while the others wait for it.
    """
    import ray
    from ray.exceptions import RayError

    reader = _Reader(job, progress)
    asked = None
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        with contextlib.suppress(RayError):
            for update in ray.get(mailbox.take.remote()):
                if "problem" in update:
                    thread.join(GRACE_SECONDS)
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
            facts = f"loss {update['loss']:.4f}, {update['rows_per_second']:,.0f} rows/s"
            done, total = update["step"] - self._first, self._total - self._first
            progress.counts(title, done, total, "steps", self._started, facts)


def _ray_storage(job: TrainingJob, scratch: str) -> dict[str, Any]:
    """Where Ray Train keeps its own notes: a folder of the run that every node reaches."""
    store = open_store(job.run_url)
    if isinstance(store, LocalStore):
        return {"storage_path": store.where(scratch)}
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    files, path = fsspec.core.url_to_fs(store.where(scratch))
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(files))}


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
            return run_training(job, post=mailbox.post.remote, stopped=_stop_request(mailbox).is_set)
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


def _stop_request(mailbox: Any) -> threading.Event:
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
