"""W&B and MLflow as places where the trials of a search are logged, each by its own package, which is an extra.

Ray Tune has callbacks for both. They see the processes in which trials are trained, of which a trial has several and a
fused group one, begin another run for each when a search goes on, and hand W&B's key on in a `runtime_env`.
"""

from __future__ import annotations

import logging
import os
import time
from importlib.util import find_spec
from typing import Any, Protocol

from raydistill.config.run import Config
from raydistill.errors import UserError, first_line
from raydistill.record.run import Run
from raydistill.record.store import LocalStore
from raydistill.search.trials import Trial

PROJECT = "raydistill"
FOLDER = "tune/logs"  # what is written here when nothing is set in the environment


class Tracker(Protocol):
    """Trials' runs by a key that stays the same when a search goes on."""

    def begin(self, key: str, trial: Trial) -> tuple[Any, int]:
        """The trial's run, new or gone on with, and after how many epochs its metrics stand there."""
        ...

    def log(self, run: Any, epoch: int, values: dict[str, float]) -> None:
        """The metrics after an epoch, counted from 1."""
        ...

    def end(self, run: Any, trial: Trial) -> None:
        """Closes a run. Of a trial that has not ended it can be gone on with."""
        ...

    def where(self) -> str:
        """How to look at the runs."""
        ...


class Wandb:
    """A run in the project WANDB_PROJECT, or `raydistill`, in the group of the run. The key is the environment's."""

    def __init__(self, config: Config, run: Run) -> None:
        import wandb

        self._wandb, self._group = wandb, config.name
        self._folder = run.store.where(FOLDER) if isinstance(run.store, LocalStore) else None
        self._project = os.environ.get("WANDB_PROJECT", PROJECT)

    def begin(self, key: str, trial: Trial) -> tuple[Any, int]:
        if self._folder:
            os.makedirs(self._folder, exist_ok=True)
        run = self._wandb.init(
            project=self._project, group=self._group, name=f"trial {trial.number}", id=key, resume="allow",
            reinit="create_new", dir=self._folder, config=dict(trial.point),
            settings=self._wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        return run, max(0, run.step - 1)

    def log(self, run: Any, epoch: int, values: dict[str, float]) -> None:
        run.log(values, step=epoch)

    def end(self, run: Any, trial: Trial) -> None:
        run.summary.update({"status": trial.status, "reason": trial.reason, "steps": trial.steps})
        run.finish(exit_code=1 if trial.status == "failed" else 0)

    def where(self) -> str:
        if self._folder and not _is_online():
            return f"wandb sync --sync-all {self._folder}/wandb"
        return f"project {self._project}, group {self._group}"


class Mlflow:
    """A run in the experiment MLFLOW_EXPERIMENT_NAME, or one of the run's name, at MLFLOW_TRACKING_URI.

    Without that address they stand in a SQLite file of the run.
    """

    STATES = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED", "running": "KILLED"}  # noqa: RUF012

    def __init__(self, config: Config, run: Run) -> None:
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table that it makes
        self._uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not self._uri:
            os.makedirs(run.store.where(FOLDER), exist_ok=True)
            self._uri = f"sqlite:///{run.store.where(FOLDER)}/mlflow.db"
        self._client = MlflowClient(tracking_uri=self._uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", f"{PROJECT}/{config.name}")
        found = self._client.get_experiment_by_name(name)
        self._experiment = self._client.create_experiment(name) if found is None else found.experiment_id

    def begin(self, key: str, trial: Trial) -> tuple[Any, int]:
        client = self._client
        found = client.search_runs([self._experiment], f"tags.raydistill_trial = '{key}'", max_results=1)
        if not found:
            tags = {"raydistill_trial": key}
            made = client.create_run(self._experiment, tags=tags, run_name=f"trial {trial.number}").info.run_id
            for name, value in trial.point.items():
                client.log_param(made, name, value)
            return made, 0
        run = found[0].info.run_id
        client.update_run(run, status="RUNNING")
        return run, max((metric.step for metric in client.get_metric_history(run, "nll")), default=0)

    def log(self, run: Any, epoch: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(run, metrics=[Metric(name, value, now, epoch) for name, value in values.items()])

    def end(self, run: Any, trial: Trial) -> None:
        for name, value in {"status": trial.status, "reason": trial.reason, "steps": trial.steps}.items():
            self._client.set_tag(run, name, value)
        self._client.set_terminated(run, self.STATES[trial.status])

    def where(self) -> str:
        return f"mlflow ui --backend-store-uri {self._uri}"


TRACKERS = {"wandb": Wandb, "mlflow": Mlflow}


def check_trackers(config: Config, run: Run) -> None:
    """Raises UserError, with the extra to install or what is to be set, for a place that trials cannot be logged to."""
    assert config.tune is not None
    for name in config.tune.log_to:
        if find_spec(name) is None:
            raise UserError(f"tune.log_to: {name} needs a package that is not there. pip install 'raydistill[{name}]'")
    is_local = isinstance(run.store, LocalStore)
    if "mlflow" in config.tune.log_to and not is_local and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError("tune.log_to: mlflow: the run's storage is no local folder. Set MLFLOW_TRACKING_URI")
    if "wandb" in config.tune.log_to and _is_online():
        _check_key()


def _is_online() -> bool:
    return os.environ.get("WANDB_MODE", "online") == "online"


def _check_key() -> None:
    import wandb

    try:
        has_key = wandb.login(prompt=False)
    except Exception as error:  # a key that is refused, a server that does not answer
        raise UserError(f"tune.log_to: wandb: {first_line(error)}. Check the key, or set WANDB_MODE=offline") from None
    if not has_key:
        raise UserError("tune.log_to: wandb: there is no key. Set WANDB_API_KEY, or WANDB_MODE=offline")
